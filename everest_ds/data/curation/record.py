"""A file of results, one JSON line for each video, so that a stopped command resumes where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from everest_ds.errors import UserError
from everest_ds.files import append_json_lines, drop_torn_line, read_json_lines

Key = TypeVar("Key")
Result = TypeVar("Result")


class Record(Generic[Key, Result]):
    """A file of results that begins with the settings they depend on. The last line of a key counts.

    Args:
        path: The file.
        settings: JSON values.
        of: What was recorded, for messages: ``check`` or ``preparation``.
        parse: Returns key and result of a line; may raise ValueError, KeyError and TypeError.
        holds: Returns whether the result of a line is still valid.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        *,
        of: str,
        parse: Callable[[dict[str, Any]], tuple[Key, Result]],
        holds: Callable[[dict[str, Any]], bool],
    ) -> None:
        self.path = path
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._of = of
        self._parse, self._holds = parse, holds
        self._can_append = False

    def read(self) -> dict[Key, Result]:
        """Return the results that are still valid; an incomplete last line is ignored.

        Raises:
            UserError: The file has other settings, or is not such a record.
        """
        try:
            header, *lines = read_json_lines(self.path) or [{"settings": self._settings}]
            settings = header["settings"]
            latest = {}
            if settings == self._settings:
                for line in lines:
                    key, result = self._parse(line)
                    latest[key] = (result, line)
            found = {key: result for key, (result, line) in latest.items() if self._holds(line)}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is not a {self._of}'s record; name another folder with --out") from error
        if settings != self._settings:
            raise UserError(
                f"{self.path.parent} contains a {self._of} with {settings}, now {self._settings}; name another "
                "folder with --out, or remove it"
            )
        return found

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to the file at once."""
        if not self._can_append:
            drop_torn_line(self.path)
            if not self.path.is_file() or not self.path.stat().st_size:
                append_json_lines(self.path, [{"settings": self._settings}])
            self._can_append = True
        append_json_lines(self.path, [line])


def identity(path: Path) -> list[int] | None:
    """Return a file's size in bytes and time of change in nanoseconds, which identify it; None if it is missing."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a zero byte in its name
        return None
    return [status.st_size, status.st_mtime_ns]
