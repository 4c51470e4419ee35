"""Kinetics-400, -600 and -700: clips as downloaded, and the CSV files of the annotations.

Files: every .csv whose header has ``youtube_id``, ``time_start`` and ``time_end``; the columns ``label`` and
``split`` are optional. Without ``split``, the name of the file says the split (train.csv, kinetics-400_val.csv).
Videos are named ``ID_000001_000011.mp4`` or ``ID.mp4``, in folders of classes or not; ``ID.mp4`` must be the clip,
not the whole video. Many videos are no longer online: missing ones are counted and listed. Labels follow the order
of the class names, as for most published weights.
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from everest_ds.data.importers.collector import UNLABELLED, Collector, Import, resolve_names, split_of
from everest_ds.data.importers.source_tree import SourceTree, annotations_of, read_text
from everest_ds.errors import UserError

_COLUMNS = ("youtube_id", "time_start", "time_end")


@dataclass(frozen=True, kw_only=True)
class KineticsOptions:
    """Options of `everest index kinetics`."""

    annotations: Path | None = None
    """Folder of the CSV files, if it is not below SRC."""
    class_names: Path | None = None
    """File with one class name a line, in the order of the labels; without it, labels follow the order of names."""


def collect(source: SourceTree, options: KineticsOptions) -> Import:
    """Return the clips that were downloaded."""
    annotations = annotations_of(source, options.annotations)
    tables = [path for path in annotations.find_files(r".+\.csv") if _has_columns(path)]
    if not tables:
        raise UserError(
            f"{annotations.root} contains no .csv with the columns {', '.join(_COLUMNS)}; download the annotations "
            "of Kinetics, or name their folder by --annotations"
        )
    clips = [clip for path in tables for clip in _read_clips(path)]
    class_names = resolve_names({class_name for _, class_name, *_ in clips} - {""}, options.class_names)
    labels = {name: label for label, name in enumerate(class_names)} | {"": UNLABELLED}
    collector = Collector(source)
    for split, class_name, youtube_id, name in clips:
        preferred = (split, class_name, class_name.replace(" ", "_"))
        path = source.find_video(name, *preferred) or source.find_video(youtube_id, *preferred)
        collector.add(split, f"{class_name}/{name}" if class_name else name, path, labels[class_name])
    return collector.finish(class_names)


def _has_columns(path: Path) -> bool:
    """Return whether a file's first line names the columns; it may be any CSV file, in any encoding."""
    try:
        with path.open("rb") as file:
            header = file.readline(4096).decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return set(_COLUMNS) <= {name.strip() for name in header.split(",")}


def _read_clips(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield split, class name (empty for none), YouTube id and file name of each row of the annotations."""
    table = csv.DictReader(read_text(path).splitlines(), skipinitialspace=True, restval="")
    named = next((split for word in re.split(r"[^a-z]+", path.stem.lower()) if (split := split_of(word))), None)
    for row in table:
        place = f"{path}, line {table.line_num}"
        split = split_of(row["split"]) if row.get("split") else named
        if split is None:
            raise UserError(
                f"{place} has no split; expected train, val or test in the column split, or in the file's name"
            )
        youtube_id = row["youtube_id"].strip()
        try:
            start_s, end_s = (int(float(row[key])) for key in ("time_start", "time_end"))
        except (ValueError, OverflowError) as error:
            times = f"{row['time_start']!r} and {row['time_end']!r}"
            raise UserError(f"{place}: expected time_start and time_end in seconds, got {times}") from error
        if not youtube_id:
            raise UserError(f"{place} has no youtube_id")
        yield split, (row.get("label") or "").strip(), youtube_id, f"{youtube_id}_{start_s:06d}_{end_s:06d}"
