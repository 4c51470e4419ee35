"""Turning and mirroring pictures as a file's display matrix asks for.

Place in the flow: a decoded frame -> its matrix -> pixels as they are to be seen. The two first columns of the
matrix say where a pixel goes: x' = a x + c y, y' = b x + d y.
"""

import struct
from typing import Any, NamedTuple

import numpy as np
from av.sidedata.sidedata import Type
from numpy.typing import NDArray

# Off a quarter turn by less than about one degree is a quarter turn, as in ffmpeg.
_TOLERANCE = 0.0175


class Orientation(NamedTuple):
    """One of the eight ways to put a picture: swap its axes, then mirror it.

    Attributes:
        swaps_axes: Whether rows become columns.
        mirrors_rows: Whether the rows are then in reverse order (upside down).
        mirrors_columns: Whether the columns are.
    """

    swaps_axes: bool = False
    mirrors_rows: bool = False
    mirrors_columns: bool = False

    @property
    def rotation(self) -> int:
        """Quarter turns counter-clockwise of readers that look at the angle of the matrix alone."""
        if self.swaps_axes:
            return 1 if self.mirrors_rows else 3
        return 2 if self.mirrors_columns else 0

    def apply(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turn frames of axes (..., height, width, colour); a view of them."""
        if self.swaps_axes:
            frames = frames.swapaxes(-3, -2)
        rows = slice(None, None, -1 if self.mirrors_rows else 1)
        columns = slice(None, None, -1 if self.mirrors_columns else 1)
        return frames[..., rows, columns, :]

    def complete(self, frames: NDArray[np.uint8], rotation: int) -> NDArray[np.uint8]:
        """Turn frames of axes (T, H, W, C) that a reader has already given so many quarter turns to."""
        if rotation == self.rotation and self.is_rotation:
            return frames
        return np.ascontiguousarray(self.apply(np.rot90(frames, -rotation, axes=(1, 2))))

    @property
    def is_rotation(self) -> bool:
        """Whether the picture is turned only, not mirrored."""
        return self.swaps_axes ^ self.mirrors_rows ^ self.mirrors_columns ^ True


def orientation_of(frame: Any) -> Orientation:
    """Return how a PyAV frame is to be turned.

    Raises:
        ValueError: By no quarter turn.
    """
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    return Orientation() if matrix is None else orientation_of_matrix(struct.unpack("=9i", bytes(matrix)))


def orientation_of_matrix(matrix: tuple[int, ...]) -> Orientation:
    """Return the turn of a display matrix: nine numbers, row by row; its scale does not count, as in ffmpeg.

    Raises:
        ValueError: It is no quarter turn, mirrored or not.
    """
    a, b, _, c, d = matrix[:5]
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(abs(b), abs(c)) <= _TOLERANCE * straight or not any((a, b, c, d)):
        return Orientation(mirrors_rows=d < 0, mirrors_columns=a < 0)
    if max(abs(a), abs(d)) <= _TOLERANCE * crossed:
        return Orientation(swaps_axes=True, mirrors_rows=b < 0, mirrors_columns=c < 0)
    raise ValueError(
        f"its display matrix {a / 65536:g} {b / 65536:g} {c / 65536:g} {d / 65536:g} is no quarter turn; "
        "re-encode it with ffmpeg, which turns the pictures"
    )
