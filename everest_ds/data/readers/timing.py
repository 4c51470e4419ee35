"""Sampling in time (data.sampling_seconds): the times of a video's frames -> the indices of a clip's frames.

Sampling by a stride in frames is in `clips.sampling`.
"""

import numpy as np
from numpy.typing import NDArray

TIME_TOLERANCE_S = 6e-4
"""A little over half a millisecond: Matroska rounds times to milliseconds, and lists may contain rounded times."""


def timed_indices(
    times_s: NDArray[np.float64], clip_length: int, seconds: float, generator: np.random.Generator
) -> list[int]:
    """Return the frames of one clip that are shown ``seconds`` apart, starting at a random time.

    The start is uniform over the times at which the whole clip fits between the starts of the first and the last
    frame, so it does not depend on the frame rate. See `frames_at`.
    """
    room_s = clip_room_s(times_s, clip_length, seconds)
    return frames_at(times_s, clip_length, seconds, float(generator.random()) * room_s)


def clip_room_s(times_s: NDArray[np.float64], clip_length: int, seconds: float) -> float:
    """Return the latest start of a clip in seconds from the first frame; 0 for a short video."""
    if len(times_s) < 1:
        raise ValueError("a video needs at least one frame")
    return max(float(times_s[-1] - times_s[0]) - (clip_length - 1) * seconds, 0.0)


def frames_at(times_s: NDArray[np.float64], clip_length: int, seconds: float, start_s: float) -> list[int]:
    """Return the frames that are shown at ``start_s + i * seconds``, for each i below ``clip_length``.

    A frame is shown from its start to the start of the next frame; a video shorter than the clip repeats its last
    frame. Frames also repeat if they are further apart than ``seconds``. Starts may be late by `TIME_TOLERANCE_S`.

    Args:
        times_s: Start of each frame of the video in seconds, ascending.
        clip_length: Frames of the clip.
        seconds: Time from one frame of the clip to the next.
        start_s: Start of the clip in seconds from the first frame.
    """
    wanted_s = times_s[0] + start_s + np.arange(clip_length) * seconds + TIME_TOLERANCE_S
    shown = np.searchsorted(times_s, wanted_s, side="right") - 1
    return [int(index) for index in np.clip(shown, 0, len(times_s) - 1)]
