"""What is known of the videos of a list: a record that grows while they are probed, and lets a later call go on."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from everest_ds.data.index import VideoPart, VideoRow
from everest_ds.data.probe import Finding, Kind, ProbeSettings
from everest_ds.errors import UserError


class Record:
    """Findings on disk, one JSON line each, after a line that says how closely videos were looked at.

    A finding holds as long as its file is as large and as old as it was; what was missing is looked for again.

    Args:
        path: The file.
        settings: How closely videos are looked at.
    """

    def __init__(self, path: Path, settings: ProbeSettings) -> None:
        self.path = path
        self._settings = asdict(settings)

    def read(self) -> dict[VideoPart, Finding]:
        """Return the findings that still hold; a last line that was cut short is left out.

        Raises:
            UserError: The file is of other settings, or none of ours.
        """
        if not self.path.is_file():
            return {}
        try:
            lines = [json.loads(line) for line in self._whole_lines()]
            settings = lines[0]["settings"] if lines else self._settings
            findings = dict(_finding_of(line) for line in lines[1:] if _still_holds(line))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is no record of a check; name another folder with --out") from error
        if settings != self._settings:
            raise UserError(
                f"{self.path.parent} holds a check with {settings}, now {self._settings}; name another folder with "
                "--out, or remove it"
            )
        return findings

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[VideoRow, Finding], None]]:
        """Provide what adds a finding; each is on disk before the next is taken."""
        whole = "".join(self._whole_lines()) if self.path.is_file() else ""
        self.path.write_text(whole or json.dumps({"settings": self._settings}) + "\n", encoding="utf-8")
        with self.path.open("a", encoding="utf-8") as file:

            def append(row: VideoRow, finding: Finding) -> None:
                file.write(json.dumps(_line_of(row, finding)) + "\n")
                file.flush()

            yield append

    def _whole_lines(self) -> list[str]:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]


def _line_of(row: VideoRow, finding: Finding) -> dict[str, Any]:
    window = {"start_s": row.start_s, "end_s": row.end_s}
    return {"path": str(row.path), **window, "file": _identity(row.path), **asdict(finding)}


def _finding_of(line: dict[str, Any]) -> tuple[VideoPart, Finding]:
    fields = {name: line[name] for name in Finding.__dataclass_fields__}
    return (Path(line["path"]), line["start_s"], line["end_s"]), Finding(**fields | {"kind": Kind(line["kind"])})


def _still_holds(line: dict[str, Any]) -> bool:
    identity = _identity(Path(line["path"]))
    return identity is not None and identity == line["file"]


def _identity(path: Path) -> list[int] | None:
    """Return a file's size and time of change; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
