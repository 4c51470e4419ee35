"""Pictures: what a model keeps of a clip, and what it makes of it.

Drawing functions take arrays and return PIL images or arrays of pixels; they know no model and need no torch.

clip          what is drawn of a clip, as arrays
colours       colours and patterns that do not depend on colour vision
paint         importance and kept tokens as pixels
sheet         rows of tiles with captions, on one image
clip_sheet    a clip's picture: frames, importance, kept tokens, reconstruction
frame_sheet   the frame selection: candidates, probabilities, drawn frames
moving        the same picture as GIF or MP4
examine       a model and a clip -> these arrays; the only module with torch
"""
