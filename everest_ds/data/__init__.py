"""Data: list of videos -> frames_THWC uint8 -> clips_BCTHW uint8, with all randomness owned by the sample.

Runs on the host, in loader processes. Knows nothing of the model. Axes: B clips, C colour channels, T frames,
H W pixels.
"""
