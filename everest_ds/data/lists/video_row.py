"""One row of a list: a video, its class, and perhaps a window of it."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from everest_ds.errors import UserError

VideoPart = tuple[Path, float | None, float | None]
"""A video, and start and end of a window in seconds; both None for the whole video."""


@dataclass(frozen=True)
class VideoRow:
    """One row of a list.

    Attributes:
        path: The video; absolute, or relative to the working directory.
        label: Class; by convention -1 for unlabelled videos.
        line: Line of the list, from 1; None without a list.
        start_s: Start of the window in seconds from the video's first frame; None (with ``end_s``) for the whole
            video.
        end_s: End of the window in seconds, above ``start_s``.

    Raises:
        UserError: Only one of the two times is given, a time is negative or not finite, or the window is empty.
    """

    path: Path
    label: int
    line: int | None = field(default=None, compare=False)
    start_s: float | None = None
    end_s: float | None = None

    def __post_init__(self) -> None:
        """Check the window."""
        fault = window_fault(self.start_s, self.end_s)
        if fault is not None:
            raise UserError(f"{self.path}: {fault}")

    @property
    def part(self) -> VideoPart:
        """The video and its window, which together identify the row's frames."""
        return self.path, self.start_s, self.end_s

    @property
    def real_path(self) -> Path:
        """The path with all links resolved as far as possible; reads the disk."""
        try:
            return Path(os.path.realpath(self.path))  # Path.resolve raises for circular links
        except ValueError:  # a zero byte in the name
            return self.path

    @property
    def name(self) -> str:
        """The path, and the window in seconds if there is one, for messages."""
        if self.start_s is None or self.end_s is None:
            return str(self.path)
        return f"{self.path} [{self.start_s:.15g}, {self.end_s:.15g}) s"


def window_fault(start_s: float | None, end_s: float | None) -> str | None:
    """Return what is wrong with a window of seconds; None for a valid window and for no window."""
    if start_s is None and end_s is None:
        return None
    if start_s is None or end_s is None:
        return f"a window needs a start and an end, got start {start_s} and end {end_s}; give both or neither"
    if not (math.isfinite(start_s) and math.isfinite(end_s)):
        return f"the window from {start_s} s to {end_s} s is not finite; expected two numbers of seconds"
    if start_s < 0:
        return f"the window starts at {start_s} s; expected 0 or later"
    if end_s <= start_s:
        return f"the window from {start_s} s to {end_s} s is empty; expected an end after the start"
    return None
