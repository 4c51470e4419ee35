"""Reading and writing lists of videos in VideoMAE's format, one ``path label`` a line; finding videos in folders.

The separator is a space, a tab or a comma; the label is the integer at the end, so paths may contain spaces and
commas. Paths are absolute, or relative to the folder of the list, and may be in double quotes. Blank lines are
skipped. After the label there may be a window, ``start end`` in seconds (``videos/a b.mp4 3 12 20.5``): then the
row is that part of the video. The full rules are in `lists.list_line`.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from decimal import Decimal
from os import fsencode
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from everest_ds.data.lists.list_block import LineBlock, has_other_line_ends, scan_block
from everest_ds.data.lists.list_line import EXPECTED, VIDEO_SUFFIXES, LineError, ListLine, needs_quotes, parse_line
from everest_ds.data.lists.packed_rows import PackedRows, RowChunk, packed
from everest_ds.data.lists.video_row import VideoPart, VideoRow, window_fault
from everest_ds.errors import UserError, escaped
from everest_ds.files import write_atomically

__all__ = [
    "PackedRows", "VideoPart", "VideoRow", "can_be_listed", "describe_repeats", "find_videos", "fingerprint",
    "format_list", "packed", "read_list", "require_reachable", "window_fault", "write_list",
]  # fmt: skip

_MIXER = 6364136223846793005
_BYTE_ORDER_MARK = "\ufeff"
_NUM_PROBED = 64
_SHOWN_CHARACTERS = 120
_BLOCK_BYTES = 1 << 20
# Paths have at most 4096 bytes, twice as many with doubled quotes; this leaves ample room.
_MOST_LINE_BYTES = 16_384
# A text with a larger share of zero bytes counts as UTF-16.
_ZERO_SHARE = 0.25


def read_list(path: Path) -> PackedRows:
    """Read a list of videos, block by block; plain lines are parsed with numpy (`lists.list_block`).

    Paths need not be UTF-8: other bytes are kept (surrogateescape).

    Raises:
        UserError: The list is missing, empty or not text, or a line is not a row or has an invalid window (the
            message has its number, and what it looks like).
    """
    try:
        with _open(path) as file:
            rows = PackedRows(_read_chunks(file, path), path.parent)
    except OSError as error:
        raise UserError(f"cannot read the list of videos {path}: {error.strerror}") from error
    if not rows:
        raise UserError(f"the list of videos {path} is empty; expected lines of `path label`")
    return rows


def write_list(path: Path, rows: Sequence[VideoRow]) -> None:
    """Write a list that `read_list` reads as the same rows.

    Raises:
        UserError: There is no row, or a path has a line break.
    """
    write_atomically(path, format_list(path, rows))


def format_list(path: Path, rows: Sequence[VideoRow]) -> str:
    """Return the text of a list that will be at ``path``.

    Videos below the list's folder get relative paths, so that both can be moved together; others get absolute
    paths. A path with spaces, commas or a quote at an end is put in double quotes.

    Raises:
        UserError: There is no row, or a path has a line break.
    """
    if not rows:
        raise UserError(f"no video for the list {path}; expected at least one")
    return "".join(f"{_format_row(row, path)}\n" for row in rows)


def can_be_listed(path: Path) -> bool:
    """Return whether a new list may contain a path: it has no line break of any kind, and is UTF-8."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return _is_one_line(path)


def _is_one_line(path: Path) -> bool:
    return str(path).splitlines() == [str(path)]


def describe_repeats(rows: Sequence[VideoRow]) -> str | None:
    """Return a note on rows with the video and window of an earlier row; None if there are none.

    They are kept: a video that is listed twice is trained on, or scored, twice, which may be intended.
    """
    rows = packed(rows)
    hashes = _hash_parts(rows)
    order = np.argsort(hashes, kind="stable")
    repeats = hashes[order[1:]] == hashes[order[:-1]]
    if not repeats.any():
        return None
    # Rows with equal hashes are now neighbours, in their order in the list; the first of them is repeated.
    starts = np.maximum.accumulate(np.where(np.concatenate([[False], repeats]), 0, np.arange(len(order))))
    places, first = order[1:][repeats], order[starts[1:][repeats]]
    others = int((rows.labels[places] != rows.labels[first]).sum())
    chosen = int(np.argmin(places))
    row, earlier = rows[int(places[chosen])], rows[int(first[chosen])]
    clash = f", {others} of them with another label" if others else ""
    place = "" if row.line is None else f" in line {row.line}, listed in line {earlier.line} already"
    name = escaped(str(row.path))
    return f"{len(places)} rows repeat an earlier one{clash}, the first is {name}{place}; all are kept"


def _hash_parts(rows: PackedRows) -> NDArray[np.int64]:
    """Return a 64-bit hash of each row's path and window; collisions are negligible."""
    hashes = np.empty(len(rows), np.int64)
    done = 0
    for paths, _, times_s in rows.chunks():
        part = np.fromiter(map(hash, paths), np.int64, len(paths))
        if times_s is not None:
            start, end = times_s.view(np.int64).T
            part = (part * _MIXER + start) * _MIXER + end
        hashes[done : done + len(part)] = part
        done += len(part)
    return hashes


def fingerprint(rows: Sequence[VideoRow]) -> str:
    """Return the number of rows, and a digest of file names (without folders), labels and windows in order."""
    digest = hashlib.sha256()
    separator = b""
    for paths, labels, times_s in packed(rows).chunks():
        names = [path.rpartition(b"/")[2] for path in paths]
        if times_s is None:
            lines = [b"%b %d" % pair for pair in zip(names, labels.tolist(), strict=True)]
        else:
            ends = _format_ends(labels, times_s)
            lines = [b"%b %b" % pair for pair in zip(names, ends, strict=True)]
        digest.update(separator + b"\n".join(lines))
        separator = b"\n"
    return f"{len(rows)} videos, {digest.hexdigest()[:12]}"


def _format_ends(labels: NDArray[np.int32], times_s: NDArray[np.float64]) -> list[bytes]:
    """Return labels and windows as in a list's lines; fast if all rows have windows, without exponents."""
    times = [repr(time) for time in times_s.ravel().tolist()]
    pairs = zip(labels.tolist(), times[::2], times[1::2], strict=True)
    text = "\n".join([f"{label} {start} {end}" for label, start, end in pairs])
    if "e" in text or "n" in text:
        rows = zip(labels.tolist(), times_s.tolist(), strict=True)
        text = "\n".join(
            f"{label}{'' if start != start else _format_window(start, end)}" for label, (start, end) in rows
        )
    return text.encode().split(b"\n")


def require_reachable(rows: Sequence[VideoRow], source: Path) -> None:
    """Check that the list names existing files, on a few rows spread over it.

    This finds a list whose paths start from the wrong folder. Single missing files are found when they are read.

    Raises:
        UserError: None of the probed files exists, or all that exist are folders.
    """
    probed = rows[:: max(1, len(rows) // _NUM_PROBED)]
    if any(_is_file(row.path) for row in probed):
        return
    folder = next((row.path for row in probed if os.path.isdir(row.path)), None)
    if folder is not None:
        raise UserError(
            f"{source} names folders, e.g. {folder}; only video files are read. Make a video from each folder of "
            "frames, or list the videos in it (`everest index folder`)"
        )
    raise UserError(
        f"none of {len(probed)} files probed from {source} exists, the first is {probed[0].path}; "
        "paths must be absolute or relative to the list's folder"
    )


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """Return the videos of files and folders, in the order given, those of a folder sorted by path.

    A path that is not a folder counts as a video, whatever its name, even a pipe or a circular link; reading it may
    fail later. Folders are searched to any depth for files with a video's suffix; hidden files and folders are
    skipped, links to folders are not followed. A video that is found twice is returned once.

    Raises:
        UserError: A path does not exist, or a folder cannot be read or contains no video.
    """
    found: list[Path] = []
    for path in paths:
        if os.path.isdir(path):  # also False if the file system refuses the path
            found += _videos_below(path)
        elif _is_there(path):
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
            f"{folder} contains no video: no file in it or below it ends in one of "
            f"{', '.join(VIDEO_SUFFIXES)}; name another folder, or the files themselves"
        )
    return sorted(videos)


def _is_there(path: Path) -> bool:
    """Return whether the path exists, or its existence cannot be determined."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return True


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no permission, an impossible name, storage gone
        return False


def _open(path: Path) -> BinaryIO:
    """Open a list without blocking; a pipe or a device is refused, since it might never end."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UserError(f"cannot read the list of videos {path}: it is not a file; write the lines into a file")
    return os.fdopen(file, "rb")


def _read_chunks(file: BinaryIO, source: Path) -> Iterator[RowChunk]:
    number = 1
    for content in _read_blocks(file, source):
        lines = content.replace(b"\r\n", b"\n") if b"\r" in content else content
        if has_other_line_ends(lines):
            text = content.decode("utf-8", "surrogateescape")
            lines = "".join(f"{line}\n" for line in text.splitlines()).encode("utf-8", "surrogateescape")
        yield _pack(scan_block(lines), source, number)
        number += lines.count(b"\n")


def _read_blocks(file: BinaryIO, source: Path) -> Iterator[bytes]:
    """Yield a list's bytes in blocks of whole lines; reading ends at a line that is far too long."""
    content = file.read(_BLOCK_BYTES)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"the list of videos {source} is UTF-16 text, not UTF-8; save it as UTF-8")
    if content.count(0) > _ZERO_SHARE * len(content):
        raise UserError(f"the list of videos {source} contains zero bytes, like UTF-16 text; save it as UTF-8")
    content = content.removeprefix(_BYTE_ORDER_MARK.encode())
    while more := file.read(_BLOCK_BYTES):
        stop = max(content.rfind(b"\n"), content.rfind(b"\r", 0, -1)) + 1
        if stop:
            yield content[:stop]
        elif len(content) > _MOST_LINE_BYTES:
            break
        content = content[stop:] + more
    if content:
        yield content if content.endswith(b"\n") else content + b"\n"


def _pack(block: LineBlock, source: Path, first: int) -> RowChunk:
    """Return the rows of a block whose first line has the number ``first``."""
    plain = block.is_plain & (block.ends - block.starts <= _MOST_LINE_BYTES)
    plain[0] &= first > 1  # only `parse_line` recognises a header row, in the list's first line
    numbers = np.arange(len(plain)) + first
    has_times = not np.isnan(block.times_s[plain, 0]).all()
    if plain.all():
        lengths = block.path_ends - block.path_starts
        return RowChunk(
            block.plain_paths(plain), lengths, block.labels, numbers, block.times_s if has_times else None
        )
    lengths = np.where(plain, block.path_ends - block.path_starts, 0)
    done, stops, plain_paths = 0, np.cumsum(lengths).tolist(), block.plain_paths(plain)
    paths: list[bytes] = []
    is_row, labels, times_s = np.ones(len(plain), bool), block.labels, block.times_s
    for place in np.flatnonzero(~plain).tolist():
        line = block.content[block.starts[place] : block.ends[place]].decode("utf-8", "surrogateescape").strip()
        if not line:
            is_row[place] = False
            continue
        found = _parse_line(line, source, int(numbers[place]))
        path = fsencode(str(Path(found.path)))
        paths += [plain_paths[done : stops[place]], path]
        done = stops[place]
        lengths[place], labels[place] = len(path), found.label
        times_s[place] = np.nan if found.start_s is None else (found.start_s, found.end_s)
        has_times |= found.start_s is not None
    content = b"".join([*paths, plain_paths[done:]])
    kept_s = times_s[is_row] if has_times else None
    return RowChunk(content, lengths[is_row], labels[is_row], numbers[is_row], kept_s)


def _parse_line(line: str, source: Path, number: int) -> ListLine:
    shown = repr(line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}...")
    if len(line) > _MOST_LINE_BYTES:
        raise UserError(f"{source}, line {number}: {shown} is longer than a path can be; {EXPECTED}")
    try:
        found = parse_line(line, number)
    except LineError as error:
        raise UserError(f"{source}, line {number}: {shown} {error}") from None
    fault = window_fault(found.start_s, found.end_s)
    if fault is not None:
        raise UserError(f"{source}, line {number}: {shown}: {fault}")
    return found


def _format_row(row: VideoRow, target: Path) -> str:
    if not _is_one_line(row.path):
        raise UserError(f"{str(row.path)!r} cannot be in the list {target}: it has a line break; rename it")
    name = str(
        row.path.relative_to(target.parent) if row.path.is_relative_to(target.parent) else row.path.absolute()
    )
    plain = name.split() == [name] and "," not in name and not name.startswith(_BYTE_ORDER_MARK)
    if not plain or needs_quotes(name):
        quoted = name.replace('"', '""')
        name = f'"{quoted}"'
    window = "" if row.start_s is None or row.end_s is None else _format_window(row.start_s, row.end_s)
    return f"{name} {row.label}{window}"


def _format_window(start_s: float, end_s: float) -> str:
    return f" {_format_time(start_s)} {_format_time(end_s)}"


def _format_time(time_s: float) -> str:
    """Return a time with a decimal point, no exponent, and enough digits to be read as the same float."""
    text = repr(float(time_s))
    if "e" in text:
        text = format(Decimal(text), "f")
    return text if "." in text else f"{text}.0"
