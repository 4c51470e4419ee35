"""Results of a list's videos on disk, one JSON line each, so that a later call continues where one stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from everest_ds.errors import UserError
from everest_ds.files import append_json_lines, drop_torn_line, read_json_lines

Key = TypeVar("Key")
Result = TypeVar("Result")


class Record(Generic[Key, Result]):
    """A file of results, after a line with the settings that they depend on. Of one key the last line counts.

    Args:
        path: The file.
        settings: JSON values.
        of: What the file is a record of, for messages: ``check``.
        parse: Makes key and result of a line; may raise ValueError, KeyError and TypeError.
        holds: Whether a line's result still holds.
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
        """Return the results that still hold; a last line that was cut short is left out.

        A file of other settings, or that is not such a record, is a UserError.
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
            raise UserError(f"{self.path} is no record of a {self._of}; name another folder with --out") from error
        if settings != self._settings:
            raise UserError(
                f"{self.path.parent} holds a {self._of} with {settings}, now {self._settings}; name another folder "
                "with --out, or remove it"
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
    """Return a file's size in bytes and time of change in nanoseconds, by which it is known; None without one."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a zero byte in its name
        return None
    return [status.st_size, status.st_mtime_ns]
