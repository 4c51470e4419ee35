"""Videos whose frames say which frame they are, in several containers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

LEVELS_PER_FRAME = 5
FRAMES_PER_S = 10


def write_ramp(
    path: Path,
    num_frames: int = 40,
    *,
    codec: str = "libx264",
    b_frames: int = 2,
    width: int = 96,
    key_every: int = 8,
) -> None:
    """Write flat frames, each five grey levels brighter than the one before, ten a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(FRAMES_PER_S))
        stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p"
        stream.thread_count = 1
        stream.bit_rate = 4_000_000
        stream.options = {"g": str(key_every), "bf": str(b_frames)}
        for index in range(num_frames):
            image = np.full((64, width, 3), LEVELS_PER_FRAME * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def shown(frames_THWC: np.ndarray) -> list[int]:
    """Which frames of a ramp these are, by their brightness."""
    return np.rint(frames_THWC.reshape(len(frames_THWC), -1).mean(axis=1) / LEVELS_PER_FRAME).astype(int).tolist()
