"""Files: atomic replacement, lines of JSON, checksums. A leaf.

A file is written under a hidden name in the folder of its target, flushed to disk, and renamed. So the target is
complete or absent, even after a power cut. An error or Ctrl-C removes the hidden file; a killed process leaves only
the hidden file behind.
"""

import contextlib
import csv
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from everest_ds.errors import UserError

MAX_JSON_BYTES = 64 * 2**20


def partial_path(path: Path) -> Path:
    """Return the hidden path under which a file is written before it is renamed."""
    return path.with_name(f".{path.name}.partial")


def is_partial(path: Path) -> bool:
    """Return whether a path has the name of an unfinished file."""
    return path.name.startswith(".") and path.name.endswith(".partial")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path for a file or folder; it replaces ``path`` when the block ends without an error.

    A file's content and name are then on disk. The contents of a folder are not flushed.

    Raises:
        OSError: The path cannot be written or renamed.
    """
    partial = partial_path(path)
    _remove(partial)
    try:
        yield partial
        if partial.is_file():
            sync(partial)
        partial.replace(path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(partial)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file. Text is written in UTF-8; line ends, and bytes of names that are not UTF-8, are unchanged.

    A file that already contains the same bytes is not written again.

    Raises:
        OSError: The file cannot be written or renamed.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    if _holds(path, data):
        _remove(partial_path(path))
        return
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, content: Any) -> None:
    """Replace a file with indented JSON; see `write_atomically`."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def parse_json(text: Any) -> Any:
    """Parse JSON from an untrusted source.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, or contains NaN, an infinite number, or an integer
            of more than 64 bits.
        TypeError: The argument is not text.
    """
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_short)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _short(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 2**64:
        raise ValueError(f"{text[:20]}... is an integer of more than 64 bits")
    return int(text)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object; see `parse_json`.

    Raises:
        UserError: The file is missing, larger than `MAX_JSON_BYTES`, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} has more than {MAX_JSON_BYTES // 2**20} MiB; expected one JSON object")
        raw = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must contain a JSON object, got {type(raw).__name__}")
    return raw


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Replace a file with a CSV table; see `write_atomically`."""
    with (
        atomic_path(path) as partial,
        partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk.

    Raises:
        OSError: Writing failed. A file system that cannot flush a folder's names is not an error.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES)):
            raise


def move_aside(path: Path, name: str) -> Path:
    """Rename a file or folder within its folder, to ``name`` or the first free one of ``name.2``, ``name.3``, ...

    Returns:
        The new path.

    Raises:
        OSError: The path cannot be renamed.
    """
    target, number = path.with_name(name), 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{name}.{number}")
    return path.rename(target)


def append_json_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append objects to a file, one a line. After a last line that was cut short, a new line is started."""
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)


def sort_json_lines(
    path: Path, is_record: Callable[[dict[str, Any]], bool]
) -> tuple[list[tuple[bytes, dict[str, Any]]], list[bytes]]:
    """Sort the lines of a file of JSON objects into valid and invalid ones; both are empty without a file.

    Args:
        path: The file.
        is_record: Returns whether an object is of the expected kind.

    Returns:
        The valid lines, each as bytes and as an object; and the other lines as bytes, without blank ones. All
        bytes end in a line break.
    """
    lines, odd = [], []
    for text, line in scan_json_lines(path, is_record) if path.is_file() else ():
        whole = text if text.endswith(b"\n") else text + b"\n"
        if line is None:
            odd.append(whole)
        else:
            lines.append((whole, line))
    return lines, odd


def scan_json_lines(
    path: Path, is_record: Callable[[dict[str, Any]], bool]
) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line of a file that is not blank, as it is and as an object; None for an object that is no record.

    One line is in memory at a time; see `sort_json_lines`.
    """
    with path.open("rb") as file:
        for text in file:
            if not text.strip():
                continue
            try:
                line = json.loads(text.decode())
                fits = isinstance(line, dict) and is_record(line)
            except (ValueError, RecursionError):
                fits = False
            yield text, line if fits else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line, without a last line that was cut short; empty without a file.

    Raises:
        ValueError: A complete line is not JSON.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def drop_torn_line(path: Path) -> None:
    """Remove a last line that was cut short. Without a file, do nothing."""
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def sha256(path: Path) -> str:
    """Return the checksum of a file, or of a folder's file names and contents."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path)} {sha256(file)}" for file in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _holds(path: Path, data: bytes) -> bool:
    """Return whether a path is a regular file (not a link) with these bytes."""
    try:
        return not path.is_symlink() and path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
