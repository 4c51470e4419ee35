"""Videos whose frames say which frame they are, in several containers."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from everest_ds.data.demo import encode_h264

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


# Turned clockwise, as the matrix of a track's header says it, and where the four corners of the picture go.
TURNS = {
    0: ((1, 0, 0, 1), [40, 90, 140, 200]),
    90: ((0, 1, -1, 0), [140, 40, 200, 90]),
    180: ((-1, 0, 0, -1), [200, 140, 90, 40]),
    270: ((0, -1, 1, 0), [90, 200, 40, 140]),
}


def write_turned(path: Path, degrees: int, num_frames: int = 3) -> None:
    """Write 96x64 pictures with four grey corners, and have the file ask for a turn."""
    picture = np.zeros((64, 96, 3), dtype=np.uint8)
    for level, rows, columns in ((40, 0, 0), (90, 0, 48), (140, 32, 0), (200, 32, 48)):
        picture[rows : rows + 32, columns : columns + 48] = level
    encode_h264(path, np.stack([picture] * num_frames))
    a, b, c, d = TURNS[degrees][0]
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    struct.pack_into(">9i", content, matrix, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def corners(frames_THWC: np.ndarray) -> list[float]:
    """Brightness near the four corners, from left to right and from top to bottom."""
    height, width = frames_THWC.shape[1:3]
    return [float(frames_THWC[:, y, x].mean()) for y in (8, height - 8) for x in (8, width - 8)]
