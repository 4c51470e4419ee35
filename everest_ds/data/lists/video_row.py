"""One row of a list: a video, its class, and a window of it where there is one."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from everest_ds.errors import UserError

VideoPart = tuple[Path, float | None, float | None]
"""A video, and start and end of a window of it in seconds; Nones for all of it."""


@dataclass(frozen=True)
class VideoRow:
    """One row of a list: where a video is, and its class (-1 where the list says so, for unlabelled video).

    Attributes:
        path: Absolute, or relative to where the program runs.
        label: Class.
        line: Line of the list, from 1; None where there is no list.
        start_s: Where the row's part of the video starts, in seconds from its first frame; None, as ``end_s``,
            for all of it.
        end_s: Where it ends, in seconds, after the start.

    Raises:
        UserError: Only one of the two times is given, one is not finite, or they make no window.
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
        """The video and the window of it: what tells a row's frames from all others'."""
        return self.path, self.start_s, self.end_s

    @property
    def real_path(self) -> Path:
        """The file itself, past all links as far as they lead anywhere; looks at the disk."""
        try:
            return Path(os.path.realpath(self.path))  # Path.resolve raises for links in a circle
        except ValueError:  # a zero byte in the name
            return self.path

    @property
    def name(self) -> str:
        """The path, and the window in seconds where there is one, for people."""
        if self.start_s is None or self.end_s is None:
            return str(self.path)
        return f"{self.path} [{self.start_s:.15g}, {self.end_s:.15g}) s"


def window_fault(start_s: float | None, end_s: float | None) -> str | None:
    """Return what is wrong with a window of seconds, None for nothing and where there is no window."""
    if start_s is None and end_s is None:
        return None
    if start_s is None or end_s is None:
        return f"a window has a start and an end, got start {start_s} and end {end_s}; give both or neither"
    if not (math.isfinite(start_s) and math.isfinite(end_s)):
        return f"the window from {start_s} s to {end_s} s is not finite; expected two numbers of seconds"
    if start_s < 0:
        return f"the window starts at {start_s} s; expected 0 or later"
    if end_s <= start_s:
        return f"the window from {start_s} s to {end_s} s ends before it has begun; expected an end after the start"
    return None
