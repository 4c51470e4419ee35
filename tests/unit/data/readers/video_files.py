"""Videos in several containers whose brightness encodes the frame number."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

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
    """Write flat frames at ten per second, each five grey levels brighter than the previous one."""
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
    """Return the numbers of a ramp's frames, from their brightness."""
    return np.rint(frames_THWC.reshape(len(frames_THWC), -1).mean(axis=1) / LEVELS_PER_FRAME).astype(int).tolist()


# The eight display matrices: a, b, c, d of a track's header, and the new order of the picture's four corners.
TURNS = {
    "as it is": ((1, 0, 0, 1), [40, 90, 140, 200]),
    "90 degrees": ((0, 1, -1, 0), [140, 40, 200, 90]),
    "180 degrees": ((-1, 0, 0, -1), [200, 140, 90, 40]),
    "270 degrees": ((0, -1, 1, 0), [90, 200, 40, 140]),
    "left to right": ((-1, 0, 0, 1), [90, 40, 200, 140]),
    "upside down": ((1, 0, 0, -1), [140, 200, 40, 90]),
    "transposed": ((0, 1, 1, 0), [40, 140, 90, 200]),
    "transposed the other way": ((0, -1, -1, 0), [200, 90, 140, 40]),
}


def turned_size(turn: str) -> tuple[int, int]:
    """Return width and height at which the pictures of `write_turned` must be shown."""
    return (96, 64) if TURNS[turn][0][0] else (64, 96)


def four_corners() -> np.ndarray:
    """Return a picture of 96x64 pixels with four grey corners."""
    picture = np.zeros((64, 96, 3), dtype=np.uint8)
    for level, rows, columns in ((40, 0, 0), (90, 0, 48), (140, 32, 0), (200, 32, 48)):
        picture[rows : rows + 32, columns : columns + 48] = level
    return picture


def write_turned_mkv(path: Path, turn: str, num_frames: int = 3) -> None:
    """Write `four_corners` with a display matrix into Matroska; skip the test if this PyAV cannot."""
    a, b, c, d = (value << 16 for value in TURNS[turn][0])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_S), options={"crf": "16", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        if not hasattr(stream, "set_display_matrix"):
            pytest.skip("this version of PyAV writes no display matrix")
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for _ in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(four_corners(), format="rgb24")))
        container.mux(stream.encode())


def write_turned(path: Path, turn: str | tuple[float, float, float, float], num_frames: int = 3) -> None:
    """Write `four_corners` into an MP4 or MOV with a display matrix."""
    encode_h264(path, np.stack([four_corners()] * num_frames))
    matrix = TURNS[turn][0] if isinstance(turn, str) else turn
    a, b, c, d = (round(value * (1 << 16)) for value in matrix)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    struct.pack_into(">9i", content, place, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def corners(frames_THWC: np.ndarray) -> list[float]:
    """Return the brightness near the four corners, left to right, then top to bottom."""
    height, width = frames_THWC.shape[1:3]
    return [float(frames_THWC[:, y, x].mean()) for y in (8, height - 8) for x in (8, width - 8)]
