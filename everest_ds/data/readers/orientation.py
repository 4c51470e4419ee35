"""Rotating and mirroring frames as a file's display matrix says.

Place in the flow: decoded frame -> its display matrix -> pixels the right way up. The first two columns of the
matrix map a pixel's position: x' = a x + c y, y' = b x + d y.
"""

import struct
from typing import Any, NamedTuple

import numpy as np
from av.sidedata.sidedata import Type
from numpy.typing import NDArray

# An angle within about one degree of a quarter turn counts as a quarter turn, as in ffmpeg.
_TOLERANCE = 0.0175


class Orientation(NamedTuple):
    """One of the eight orientations of a picture: its axes are swapped first, then it is mirrored.

    Attributes:
        swaps_axes: Whether rows become columns.
        mirrors_rows: Whether the order of the rows is then reversed (upside down).
        mirrors_columns: Whether the order of the columns is then reversed.
    """

    swaps_axes: bool = False
    mirrors_rows: bool = False
    mirrors_columns: bool = False

    @property
    def rotation(self) -> int:
        """Counter-clockwise quarter turns by the matrix's angle alone, as applied by readers that never mirror."""
        if self.swaps_axes:
            return 1 if self.mirrors_rows else 3
        return 2 if self.mirrors_columns else 0

    def apply(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return frames of axes (..., height, width, colour) the right way up, as a view."""
        if self.swaps_axes:
            frames = frames.swapaxes(-3, -2)
        rows = slice(None, None, -1 if self.mirrors_rows else 1)
        columns = slice(None, None, -1 if self.mirrors_columns else 1)
        return frames[..., rows, columns, :]

    def complete(self, frames: NDArray[np.uint8], rotation: int) -> NDArray[np.uint8]:
        """Return frames_THWC the right way up that a reader has already rotated by ``rotation`` quarter turns."""
        if rotation == self.rotation and self.is_rotation:
            return frames
        return np.ascontiguousarray(self.apply(np.rot90(frames, -rotation, axes=(1, 2))))

    @property
    def is_rotation(self) -> bool:
        """Whether the picture is rotated and not mirrored."""
        return self.swaps_axes ^ self.mirrors_rows ^ self.mirrors_columns ^ True


def orientation_of(frame: Any) -> Orientation:
    """Return the orientation of a PyAV frame.

    Raises:
        ValueError: Its display matrix is not a multiple of a quarter turn.
    """
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    return Orientation() if matrix is None else orientation_of_matrix(struct.unpack("=9i", bytes(matrix)))


def orientation_of_matrix(matrix: tuple[int, ...]) -> Orientation:
    """Return the orientation of a display matrix (nine numbers, row by row); its scale is ignored, as in ffmpeg.

    Raises:
        ValueError: The matrix is not a multiple of a quarter turn, mirrored or not.
    """
    a, b, _, c, d = matrix[:5]
    straight, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(abs(b), abs(c)) <= _TOLERANCE * straight or not any((a, b, c, d)):
        return Orientation(mirrors_rows=d < 0, mirrors_columns=a < 0)
    if max(abs(a), abs(d)) <= _TOLERANCE * crossed:
        return Orientation(swaps_axes=True, mirrors_rows=b < 0, mirrors_columns=c < 0)
    raise ValueError(
        f"its display matrix {a / 65536:g} {b / 65536:g} {c / 65536:g} {d / 65536:g} is not a multiple of a "
        "quarter turn; re-encode it with ffmpeg, which rotates the frames"
    )
