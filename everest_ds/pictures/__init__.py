"""Pictures of the tokens that a model keeps of a clip, and of its reconstruction.

Drawing functions take arrays and return PIL images or arrays of pixels. They need no model and no torch.

clip          a clip, its importance and kept tokens, as arrays
colours       colours and patterns that do not depend on colour vision
paint         importance and kept tokens as pixels
sheet         rows of tiles with captions, on one image
clip_sheet    a clip's picture: frames, importance, kept tokens, reconstruction
frame_sheet   the frame selection: candidates, probabilities, drawn frames
moving        a clip's picture as GIF or MP4
charts        kept tokens by time step, and curves of a run
examine       run a model on a clip to get these arrays; the only module with torch
"""
