"""Lists of videos, as VideoMAE users have them: one ``path label`` a line.

The separator is a space, a tab or a comma; the label is the integer at the end, so paths may hold spaces and
commas. Paths are absolute, or relative to the folder of the list. A path in double quotes loses them. Blank
lines are skipped. For `everest predict`, videos are also found by folder.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from everest_ds.errors import UserError

_ROW = re.compile(r"^(?P<path>.*\S)\s*(?:,|\s)\s*(?P<label>-?\d+)$")
_NUM_PROBED = 64
_VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
)


@dataclass(frozen=True)
class VideoRow:
    """One row of a list: where a video is, and its class (-1 where the list says so, for unlabelled video).

    Attributes:
        path: Absolute, or relative to where the program runs.
        label: Class.
        line: Line of the list, from 1; None where there is no list.
        start_s: Where the row's part of the video starts, in seconds from its first frame; None for its beginning.
        end_s: Where that part ends, in seconds; None for the video's end.
    """

    path: Path
    label: int
    line: int | None = field(default=None, compare=False)
    start_s: float | None = None
    end_s: float | None = None


def read_list(path: Path) -> list[VideoRow]:
    """Read a list of videos.

    Raises:
        UserError: The list is missing, is empty, or has a row without a label (with its line number).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the list of videos {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the list of videos {path} is not UTF-8 text: {error.reason}") from error
    rows = [
        _parse_row(line.strip(), path, number)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"the list of videos {path} is empty; expected lines of `path label`")
    return rows


def fingerprint(rows: list[VideoRow]) -> str:
    """Return how many videos a list has and a digest of their names and labels in order, not of their folders."""
    text = "\n".join(f"{row.path.name} {row.label}" for row in rows)
    return f"{len(rows)} videos, {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def require_reachable(rows: list[VideoRow], source: Path) -> None:
    """Check that the list points at files, by looking at a few rows spread over it.

    Single missing files are found when they are read; a list whose paths start in the wrong folder is found here.

    Raises:
        UserError: None of the probed files exists.
    """
    probed = rows[:: max(1, len(rows) // _NUM_PROBED)]
    if not any(_is_file(row.path) for row in probed):
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
        if path.is_dir():
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
        videos += [path for path in paths if path.suffix.lower() in _VIDEO_SUFFIXES]
    if not videos:
        raise UserError(
            f"{folder} holds no video: no file in it or below it ends in one of "
            f"{', '.join(_VIDEO_SUFFIXES)}; name another folder, or the files themselves"
        )
    return sorted(videos)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no permission, a name too long, storage that does not answer
        return False


def _parse_row(line: str, source: Path, number: int) -> VideoRow:
    match = _ROW.match(line)
    if match is None:
        raise UserError(
            f"{source}, line {number}: {line!r} has no label; expected `path label` with an integer label "
            "(0 where there are no classes)"
        )
    name = match["path"].rstrip(",").rstrip()
    if len(name) > 2 and name[0] == name[-1] == '"':
        name = name[1:-1]
    return VideoRow(source.parent / name, int(match["label"]), number)
