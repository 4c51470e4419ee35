"""Lists of videos, as VideoMAE users have them: one ``path label`` a line, read and written.

The separator is a space, a tab or a comma; the label is the integer at the end, so paths may hold spaces and
commas. Paths are absolute, or relative to the folder of the list. A path in double quotes loses them. Blank
lines are skipped. After the label there may be a window, ``start end`` in seconds (``videos/a b.mp4 3 12 20.5``):
then the row is that part of the video. `lists.list_line` has the rules in full. For `everest predict`,
videos are also found by folder.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from os import fsdecode, fsencode
from pathlib import Path
from typing import overload

import numpy as np

from everest_ds.data.lists.list_line import VIDEO_SUFFIXES, LineError, needs_quotes, parse_line
from everest_ds.errors import UserError
from everest_ds.files import write_atomically

_BYTE_ORDER_MARK = "\ufeff"
_NUM_PROBED = 64
_SHOWN_CHARACTERS = 120

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


def read_list(path: Path) -> list[VideoRow]:
    """Read a list of videos.

    Raises:
        UserError: The list is missing, is empty or is no text, or a line is no row of a list or has times that make
            no window (with its number, and what it looks like).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the list of videos {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the list of videos {path} is not UTF-8 text: {error.reason}") from error
    if "\0" in text:
        raise UserError(f"the list of videos {path} holds zero bytes, as UTF-16 text does; save it as UTF-8")
    rows = [
        _parse_row(line.strip(), path, number)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"the list of videos {path} is empty; expected lines of `path label`")
    return rows


def write_list(path: Path, rows: Sequence[VideoRow]) -> None:
    """Write a list that `read_list` reads as the same rows.

    Raises:
        UserError: There is no row, or a path cannot stand in a list.
    """
    write_atomically(path, format_list(path, rows))


def format_list(path: Path, rows: Sequence[VideoRow]) -> str:
    """Return the text of a list that will be at ``path``.

    Videos below the list's folder are named relative to it, so that they can move together; others by their
    absolute path. A path with spaces, commas or a quote at an end is put in double quotes.

    Raises:
        UserError: There is no row, or a path cannot stand in a list.
    """
    if not rows:
        raise UserError(f"no video for the list {path}; expected at least one")
    return "".join(f"{_format_row(row, path)}\n" for row in rows)


def can_be_listed(path: Path) -> bool:
    """Say whether a path can stand in a list: it has no line break of any kind, and its bytes are UTF-8."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return str(path).splitlines() == [str(path)]


def describe_repeats(rows: Sequence[VideoRow]) -> str | None:
    """Return what people should know of rows that repeat an earlier one's video and window; None without any.

    They are kept: a video that is listed twice is seen, or scored, twice, which some want and most do not.
    """
    first: dict[VideoPart, VideoRow] = {}
    repeats = [(row, earlier) for row in rows if (earlier := first.setdefault(row.part, row)) is not row]
    if not repeats:
        return None
    row, earlier = repeats[0]
    others = sum(row.label != earlier.label for row, earlier in repeats)
    clash = f", {others} of them with another label" if others else ""
    place = "" if row.line is None else f" in line {row.line}, listed in line {earlier.line} already"
    return f"{len(repeats)} rows repeat an earlier one{clash}, the first is {row.path}{place}; all are kept"


def fingerprint(rows: list[VideoRow]) -> str:
    """Return how many videos a list has, and a digest of names, labels and windows in order, without folders."""
    text = "\n".join(f"{row.path.name} {row.label}{_format_window(row)}" for row in rows)
    return f"{len(rows)} videos, {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def require_reachable(rows: list[VideoRow], source: Path) -> None:
    """Check that the list points at files, by looking at a few rows spread over it.

    Single missing files are found when they are read; a list whose paths start in the wrong folder is found here.

    Raises:
        UserError: None of the probed files exists, or all that exist are folders.
    """
    probed = rows[:: max(1, len(rows) // _NUM_PROBED)]
    if any(_is_file(row.path) for row in probed):
        return
    folder = next((row.path for row in probed if os.path.isdir(row.path)), None)
    if folder is not None:
        raise UserError(
            f"{source} names folders, {folder} for instance; only video files are read. Make a video of each "
            "folder of frames, or list the videos in it (`everest index folder`)"
        )
    raise UserError(
        f"none of {len(probed)} files probed from {source} exists, the first is {probed[0].path}; "
        "paths must be absolute or relative to the list's folder"
    )


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """Return the videos of files and folders, in the order given, those of a folder sorted by path.

    A file counts whatever its name. Folders are searched to any depth for files with a video's suffix; hidden files
    and folders are passed over, links to folders not followed. A video that is met twice is returned once.

    Raises:
        UserError: A path does not exist, a folder cannot be read, or holds no video.
    """
    found: list[Path] = []
    for path in paths:
        if os.path.isdir(path):  # False, too, where the file system refuses the path
            found += _videos_below(path)
        elif _is_file(path):
            found.append(path)
        else:
            raise UserError(f"{path} is neither a file nor a folder; expected a video or a folder of videos")
    return list(dict.fromkeys(found))


def _videos_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    videos = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent) / name for name in names if not name.startswith(".")]
        videos += [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        raise UserError(
            f"{folder} holds no video: no file in it or below it ends in one of "
            f"{', '.join(VIDEO_SUFFIXES)}; name another folder, or the files themselves"
        )
    return sorted(videos)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no permission, a name too long, storage that does not answer
        return False


def _parse_row(line: str, source: Path, number: int) -> VideoRow:
    shown = repr(line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}...")
    try:
        found = parse_line(line, number)
    except LineError as error:
        raise UserError(f"{source}, line {number}: {shown} {error}") from None
    fault = window_fault(found.start_s, found.end_s)
    if fault is not None:
        raise UserError(f"{source}, line {number}: {shown}: {fault}")
    return VideoRow(source.parent / found.path, found.label, number, found.start_s, found.end_s)


def _format_row(row: VideoRow, target: Path) -> str:
    if not can_be_listed(row.path):
        raise UserError(
            f"{str(row.path)!r} cannot stand in the list {target}: it holds a line break or is not UTF-8; rename it"
        )
    name = str(
        row.path.relative_to(target.parent) if row.path.is_relative_to(target.parent) else row.path.absolute()
    )
    plain = name.split() == [name] and "," not in name and not name.startswith(_BYTE_ORDER_MARK)
    if not plain or needs_quotes(name):
        quoted = name.replace('"', '""')
        name = f'"{quoted}"'
    return f"{name} {row.label}{_format_window(row)}"


def _format_window(row: VideoRow) -> str:
    if row.start_s is None or row.end_s is None:
        return ""
    return f" {_format_time(row.start_s)} {_format_time(row.end_s)}"


def _format_time(time_s: float) -> str:
    """Return a time with a point, without an exponent, in as many digits as it takes to read the same again."""
    text = format(Decimal(repr(float(time_s))), "f")
    return text if "." in text else f"{text}.0"


class PackedRows(Sequence[VideoRow]):
    """The rows of a list in little memory, without the numbers of their lines; a row is built when it is taken."""

    def __init__(self, rows: Iterable[VideoRow]) -> None:
        rows = list(rows)
        paths = [fsencode(row.path) for row in rows]
        self._paths = b"".join(paths)
        self._ends = np.cumsum([0, *map(len, paths)], dtype=np.int64)
        self._labels = np.array([row.label for row in rows], dtype=np.int64)
        times = [(row.start_s, row.end_s) for row in rows]
        whole = all(time == (None, None) for time in times)
        self._times_s = None if whole else np.array(times, dtype=np.float64)  # NaN where there is no window

    def __len__(self) -> int:
        return len(self._labels)

    @overload
    def __getitem__(self, index: int) -> VideoRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[VideoRow]: ...

    def __getitem__(self, index: int | slice) -> VideoRow | list[VideoRow]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # raises for one that is out of range
        path = Path(fsdecode(self._paths[self._ends[row] : self._ends[row + 1]]))
        label = int(self._labels[row])
        if self._times_s is None or np.isnan(self._times_s[row, 0]):
            return VideoRow(path, label)
        start_s, end_s = self._times_s[row].tolist()
        return VideoRow(path, label, start_s=start_s, end_s=end_s)
