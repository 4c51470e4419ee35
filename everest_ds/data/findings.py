"""What is known of the videos of a list: a record that grows while they are probed, and lets a later call go on."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from everest_ds.data.index import VideoPart, VideoRow
from everest_ds.data.journal import Journal, identity
from everest_ds.data.probe import Finding, Kind, ProbeSettings


class Record:
    """Findings on disk, one JSON line each, after a line that says how closely videos were looked at.

    A finding holds as long as its file is as large and as old as it was. What was missing or cut off is looked at
    again: older versions took a file with longer sound for one that was cut off.

    Args:
        path: The file.
        settings: How closely videos are looked at.
    """

    def __init__(self, path: Path, settings: ProbeSettings) -> None:
        self._journal = Journal(path, asdict(settings), of="check")

    def read(self) -> dict[VideoPart, Finding]:
        """Return the findings that still hold; a last line that was cut short is left out.

        Raises:
            UserError: The file is of other settings, or none of ours.
        """
        entries = self._journal.read(lambda line: (_finding_of(line), _still_holds(line)))
        return dict(finding for finding, holds in entries if holds)

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[VideoRow, Finding], None]]:
        """Provide what adds a finding; each is on disk before the next is taken."""
        with self._journal.appending() as append:
            yield lambda row, finding: append(_line_of(row, finding))


def _line_of(row: VideoRow, finding: Finding) -> dict[str, Any]:
    window = {"start_s": row.start_s, "end_s": row.end_s}
    return {"path": str(row.path), **window, "file": identity(row.path), **asdict(finding)}


def _finding_of(line: dict[str, Any]) -> tuple[VideoPart, Finding]:
    fields = {name: line[name] for name in Finding.__dataclass_fields__}
    return (Path(line["path"]), line["start_s"], line["end_s"]), Finding(**fields | {"kind": Kind(line["kind"])})


def _still_holds(line: dict[str, Any]) -> bool:
    known = identity(Path(line["path"]))
    return known is not None and known == line["file"] and line["kind"] != Kind.TRUNCATED
