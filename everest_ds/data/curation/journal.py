"""A file of JSON lines that grows while a list of videos is worked through, and lets a later call go on."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from everest_ds.errors import UserError
from everest_ds.files import append_json_lines, drop_torn_line, read_json_lines

Entry = TypeVar("Entry")


class Journal:
    """Lines on disk, one JSON object each, after a line with the settings under which they came about.

    Args:
        path: The file.
        settings: What the work depends on; JSON values.
        of: What the file is a record of, for messages: ``check``.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, of: str) -> None:
        self.path = path
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._of = of

    def read(self, parse: Callable[[dict[str, Any]], Entry]) -> list[Entry]:
        """Return what ``parse`` makes of the lines; a last line that was cut short is left out.

        Args:
            parse: May raise ValueError, KeyError and TypeError for what is no line of ours.

        Raises:
            UserError: The file is of other settings, or none of ours.
        """
        if not self.path.is_file():
            return []
        try:
            lines = read_json_lines(self.path)
            settings = lines[0]["settings"] if lines else self._settings
            entries = [parse(line) for line in lines[1:]] if settings == self._settings else []
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is no record of a {self._of}; name another folder with --out") from error
        if settings != self._settings:
            raise UserError(
                f"{self.path.parent} holds a {self._of} with {settings}, now {self._settings}; name another folder "
                "with --out, or remove it"
            )
        return entries

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Provide what adds a line; each is on disk before the next is taken."""
        drop_torn_line(self.path)
        if not self.path.is_file() or not self.path.stat().st_size:
            append_json_lines(self.path, [{"settings": self._settings}])
        yield lambda line: append_json_lines(self.path, [line])


def identity(path: Path) -> list[int] | None:
    """Return a file's size in bytes and time of change in nanoseconds, by which it is known; None without one."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
