"""Data: list of videos -> frames_THWC uint8 -> clips_BCTHW uint8. Every random draw is keyed by its sample.

Runs on the host, in loader workers, and does not import the model. Axes: B clips, C colour channels, T frames, H W
pixels.
"""
