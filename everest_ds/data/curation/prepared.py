"""The folder of a preparation, besides its videos: lists, names of the classes, and the summary."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from everest_ds.data.curation.journal import Journal, identity
from everest_ds.data.curation.reencode import Prepared, PrepareSettings, target_name
from everest_ds.data.lists.classes import NAMES_FILE
from everest_ds.data.lists.video_list import VideoRow, format_list
from everest_ds.errors import UserError
from everest_ds.files import write_atomically

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


Targets = Mapping[Path, Sequence[tuple[str, VideoRow]]]
"""The rows of each list, and where the file of each row stands in the folder."""

MANIFEST, SUMMARY, VIDEOS = "manifest.jsonl", "summary.json", "videos"


def require_place(sources: Sequence[Path], out: Path) -> dict[str, Any]:
    """Check that nothing of another's is written over; return what the summary of earlier calls says of lists.

    Raises:
        UserError: Two lists have one name, a list's name is taken, or names of the classes differ.
    """
    names = [source.name for source in sources]
    for source in sources:
        if names.count(source.name) > 1:
            raise UserError(f"two lists are called {source.name}; rename one, or use another --out for it")
        if source.name in (MANIFEST, SUMMARY, VIDEOS, NAMES_FILE):
            raise UserError(f"a list cannot be called {source.name}, as another file of --out is; rename it")
    earlier: dict[str, Any] = {}
    if (out / SUMMARY).is_file():
        try:
            earlier = dict(json.loads((out / SUMMARY).read_text(encoding="utf-8"))["lists"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{out / SUMMARY} is none of a preparation; name another folder with --out") from error
    for source in sources:
        known = earlier.get(source.name, {}).get("source")
        if (out / source.name).exists() and known != str(source.resolve()):
            whose = f"the list of {known}" if known else "no list of ours"
            raise UserError(f"{out / source.name} is {whose}; rename {source}, or name another folder with --out")
    _class_names(sources, out)
    return earlier


def _class_names(sources: Sequence[Path], out: Path) -> bytes | None:
    """Return the one file of class names beside the lists and in the folder; None without any."""
    files = [folder / NAMES_FILE for folder in (out, *(source.parent for source in sources))]
    texts = {path.read_bytes(): path for path in files if path.is_file()}
    if len(texts) > 1:
        one, other, *_ = texts.values()
        raise UserError(f"{one} and {other} differ; lists of other classes need another --out")
    return next(iter(texts), None)


def write_lists(
    lists: Targets,
    done: Mapping[str, Prepared],
    earlier: dict[str, Any],
    out: Path,
    settings: PrepareSettings,
    lost: str,
) -> dict[str, dict[str, Any]]:
    """Write the summary, a list for each list, and the names of the classes.

    Args:
        lists: What was prepared.
        done: What came of each target.
        earlier: What `require_place` returned.
        out: The folder.
        settings: How videos were prepared.
        lost: What they have not, in words.

    Returns:
        What the summary says of each of these lists, by name.
    """
    accounts = {source.name: _account(source, rows, done) for source, rows in lists.items()}
    summary = {"settings": asdict(settings), "lost": lost, "lists": earlier | accounts}
    # First, since by it a later call knows the lists as ours.
    write_atomically(out / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    for source, rows in lists.items():
        kept = [VideoRow(out / target, row.label) for target, row in rows if done[target].fault is None]
        write_atomically(out / source.name, format_list(out / source.name, kept) if kept else "")
    names = _class_names(list(lists), out)
    if names is not None:
        write_atomically(out / NAMES_FILE, names)
    return accounts


def _account(source: Path, rows: Sequence[tuple[str, VideoRow]], done: Mapping[str, Prepared]) -> dict[str, Any]:
    made = {target: row for target, row in rows if done[target].fault is None}
    bytes_before = sum(_sizes({row.path.resolve() for row in made.values()}))
    bytes_after = sum(done[target].bytes_after for target in made)
    return {
        "source": str(source.resolve()),
        "rows": len(rows),
        "left_out": sum(done[target].fault is not None for target, _ in rows),
        "videos": len(made),
        "frames": sum(done[target].frames_out for target in made),
        "bytes_before": bytes_before,
        "bytes_after": bytes_after,
        "growth": round(bytes_after / bytes_before, 3) if bytes_before else 0.0,
    }


def _sizes(paths: Iterable[Path]) -> list[int]:
    return [path.stat().st_size for path in paths if path.is_file()]
