"""Files: atomic replacement, lines of JSON, checksums. A leaf.

A file is written beside its target under a hidden name and then renamed: the target is there whole or not at all.
An error or Ctrl-C removes the hidden file; a process that is killed leaves it behind and nothing else.
"""

import contextlib
import csv
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from everest_ds.errors import UserError

MAX_JSON_BYTES = 64 * 2**20


def partial_path(path: Path) -> Path:
    """Return where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def is_partial(path: Path) -> bool:
    """Return whether a path has the name of an unfinished file."""
    return path.name.startswith(".") and path.name.endswith(".partial")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Provide a path to write a file or folder to; it replaces ``path`` when the block ends without an error.

    Raises:
        OSError: It cannot be written or renamed.
    """
    partial = partial_path(path)
    _remove(partial)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(partial)
        raise


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Replace a file; text is written in UTF-8, its line ends and the bytes of odd names unchanged.

    Args:
        path: The file.
        content: All of it.
        durable: Wait until the file and its name are on disk.

    Raises:
        OSError: It cannot be written or renamed.
    """
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
        if durable:
            sync(partial)
    if durable:
        sync(path.parent)


def write_json(path: Path, content: Any, *, durable: bool = False) -> None:
    """Replace a file by indented JSON; see `write_atomically`."""
    write_atomically(path, json.dumps(content, indent=2) + "\n", durable=durable)


def parse_json(text: Any) -> Any:
    """Parse JSON that may be a stranger's.

    Raises:
        ValueError: It is no JSON, is nested too deeply, or holds NaN, an infinite number, or an integer of more
            than 64 bits.
        TypeError: It is no text.
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
    """Read a file that holds one JSON object; see `parse_json`.

    Raises:
        UserError: The file is missing, is no JSON of a sane size, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} has more than {MAX_JSON_BYTES // 2**20} MiB; expected one object of JSON")
        raw = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold an object, got {type(raw).__name__}")
    return raw


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Replace a file by a table; see `write_atomically`."""
    with (
        atomic_path(path) as partial,
        partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_json_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append objects to a file, one a line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def read_whole_lines(path: Path) -> list[str]:
    """Return a file's lines with their line ends, without a last line that was cut short; none without a file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith("\n") else lines[:-1]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line; see `read_whole_lines`.

    Raises:
        ValueError: A whole line is not JSON.
    """
    return [json.loads(line) for line in read_whole_lines(path)]


def drop_torn_line(path: Path) -> None:
    """Remove a last line that was cut short; nothing without a file."""
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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
