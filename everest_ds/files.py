"""Files that are there whole or not at all. A leaf.

A file is written beside its place, under a hidden name, and then renamed. An error or Ctrl-C removes it; a process
that is killed leaves the hidden file and nothing else.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Return where a file is written until it is whole."""
    return path.with_name(f".{path.name}.partial")


def is_partial(path: Path) -> bool:
    """Return whether a path is that of a file that is not whole, or never became so."""
    return path.name.startswith(".") and path.name.endswith(".partial")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Provide a path to write to; the file there takes its place when the block ends without an error.

    Raises:
        OSError: It cannot be written or renamed.
    """
    partial = partial_path(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_whole_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, with line ends as they are, in place of what was there.

    Raises:
        OSError: It cannot be written or renamed.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")
