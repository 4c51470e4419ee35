"""What has been prepared: a record that grows file by file, and lets a later call go on."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from everest_ds.data.index import VideoRow
from everest_ds.data.journal import Journal, identity
from everest_ds.data.prepare import Prepared, PrepareSettings, target_name

# What a line has besides a result's own fields.
_OF_THE_CALL = ("is_disk_full",)


class Manifest:
    """Results on disk, one JSON line each, after a line that says how files are made. Later lines count.

    A file holds as long as it is as large as it was and its source, where that is still there, unchanged. What
    failed does not hold: it is tried again.

    Args:
        path: The file, in the folder of the preparation.
        settings: How files are made.
    """

    def __init__(self, path: Path, settings: PrepareSettings) -> None:
        self._folder = path.parent
        self._journal = Journal(path, asdict(settings), of="preparation")

    def read(self, min_psnr_db: float) -> dict[str, Prepared]:
        """Return the results that still hold, by target.

        Args:
            min_psnr_db: What a file's worst frame must have.

        Raises:
            UserError: The file is of other settings, or none of ours.
        """
        latest = dict(self._journal.read(lambda line: (str(line["target"]), (_prepared_of(line), line))))
        return {
            target: prepared
            for target, (prepared, line) in latest.items()
            if self._holds(prepared, line) and (prepared.psnr_db or 0.0) >= min_psnr_db
        }

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[VideoRow, Prepared], None]]:
        """Provide what adds a result; each is on disk before the next is taken."""
        with self._journal.appending() as append:
            yield lambda row, prepared: append(_line_of(row, prepared))

    def _holds(self, prepared: Prepared, line: dict[str, Any]) -> bool:
        if prepared.fault is not None:
            return False
        made, source = identity(self._folder / line["target"]), identity(Path(line["source"]))
        return made is not None and made[0] == prepared.bytes_after and source in (None, line["file"])


def _line_of(row: VideoRow, prepared: Prepared) -> dict[str, Any]:
    known = identity(row.path)
    return {
        "source": str(row.path.absolute()),
        "start_s": row.start_s,
        "end_s": row.end_s,
        "target": target_name(row),
        "file": known,
        "bytes_before": known[0] if known else 0,
        **{name: value for name, value in asdict(prepared).items() if name not in _OF_THE_CALL},
    }


def _prepared_of(line: dict[str, Any]) -> Prepared:
    return Prepared(**{name: line[name] for name in Prepared.__dataclass_fields__ if name not in _OF_THE_CALL})
