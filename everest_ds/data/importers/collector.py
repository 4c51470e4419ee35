"""Result of an importer: rows by split, and a report of everything that did not become a row.

Place in the flow: `SourceTree` and a dataset's annotations -> `Collector` -> `Import` -> the writer.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from everest_ds.data.importers.source_tree import SourceTree, one_file
from everest_ds.data.lists.classes import read_class_names
from everest_ds.data.lists.video_list import VideoRow, can_be_listed, window_fault
from everest_ds.errors import UserError

SPLITS = ("train", "val", "test")
UNLABELLED = -1

# Reasons for leaving something out, in the words of the summary.
REPEATED = "named again in the same split"
CONTRADICTED = "named again in the same split with another label"
UNLISTABLE = "a path with a line break, or that is not UTF-8"
NO_WINDOW = "times that make no window"
UNNAMED = "a video that the annotations do not name"

_SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val", "validation": "val",
    "test": "test", "testing": "test", "holdout": "test",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Import:
    """A dataset as lists."""

    rows: dict[str, list[VideoRow]]
    """Rows of each split that has any, in the order train, val, test; paths are absolute."""
    class_names: tuple[str, ...]
    """By label; empty if the dataset has no classes."""
    missing: list[tuple[str, str]]
    """Videos that the annotations name and the folder lacks, as (split, name)."""
    left_out: dict[str, list[str]]
    """Names of other things that did not become rows, by reason."""
    notes: list[str]


class Collector:
    """Collects the rows of an import, and records what is missing or left out."""

    def __init__(self, source: SourceTree) -> None:
        self._source = source
        self._rows: dict[str, list[VideoRow]] = {split: [] for split in SPLITS}
        self._labels: dict[tuple[str, Path, float | None, float | None], int] = {}
        self._missing: dict[tuple[str, str], None] = {}  # in order, each once
        self._left_out: dict[str, list[str]] = defaultdict(list)
        self._handled: set[Path] = set()
        self._notes: list[str] = []

    def add(
        self, split: str, name: str, path: Path | None, label: int,
        window: tuple[float | None, float | None] = (None, None),
    ) -> None:  # fmt: skip
        """Add a video, or a window of it in seconds; with ``path`` None it is missing, label -1 is unlabelled."""
        if path is None:
            self._missing[split, _printable(name)] = None
            return
        self._handled.add(path)
        key = (split, path, *window)
        if not can_be_listed(path):
            self.leave_out(UNLISTABLE, name)
        elif window_fault(*window) is not None:
            self.leave_out(NO_WINDOW, f"{name} {window[0]} {window[1]}")
        elif key in self._labels:
            self.leave_out(REPEATED if self._labels[key] == label else CONTRADICTED, f"{split} {name}")
        else:
            self._labels[key] = label
            self._rows[split].append(VideoRow(path, label, start_s=window[0], end_s=window[1]))

    def leave_out(self, reason: str, name: str, path: Path | None = None) -> None:
        """Record something that does not become a row, and mark its file, if it has one, as handled."""
        self._left_out[reason].append(_printable(name))
        if path is not None:
            self._handled.add(path)

    def note(self, text: str) -> None:
        self._notes.append(text)

    def find_split_files(self, annotations: SourceTree, names: Mapping[str, tuple[str, str]]) -> dict[str, Path]:
        """Return the annotation file of each split that has one; a note names the other splits.

        ``names`` maps a split to the pattern and the name of its file.

        Raises:
            UserError: No split has a file.
        """
        found = {}
        for split, (pattern, name) in names.items():
            if annotations.find_files(pattern):
                found[split] = one_file(annotations, pattern, name)
            else:
                self.note(f"{name} is missing, so there is no list for {split}")
        if not found:
            every = ", ".join(name for _, name in names.values())
            raise UserError(
                f"{annotations.root} contains no {every}; download them, or name their folder by --annotations"
            )
        return found

    def finish(self, class_names: tuple[str, ...]) -> Import:
        """Return the import, with unnamed videos and notes on oddities.

        Raises:
            UserError: There is no row.
        """
        source = self._source
        for path in source.videos:
            if path not in self._handled:
                self.leave_out(UNNAMED, source.name_of(path))
        rows = {split: rows for split, rows in self._rows.items() if rows}
        if not rows and not self._missing and self._left_out:
            reason, names = next(iter(self._left_out.items()))
            raise UserError(
                f"no video of {source.root} can be listed: {len(names)} of {len(source.videos)} are left out "
                f"({reason}), e.g. {names[0]}"
            )
        if not rows:
            first = f"the first is {next(iter(self._missing))[1]}" if self._missing else "the annotations name none"
            raise UserError(
                f"{source.root} contains none of the {len(self._missing)} videos that the annotations name "
                f"({first}), and {len(source.videos)} others; set SRC to the folder with the videos"
            )
        return Import(
            rows=rows,
            class_names=class_names,
            missing=list(self._missing),
            left_out=dict(self._left_out),
            notes=[*self._notes, *_describe_oddities(rows, class_names, source.num_ambiguous)],
        )


def split_of(word: str) -> str | None:
    """Return the split that a word names, in any case; None if it names no split."""
    return _SPLIT_WORDS.get(word.strip().casefold())


def resolve_names(found: Collection[str], names_file: Path | None) -> tuple[str, ...]:
    """Return the class names by label: the found ones, sorted, or those of a file.

    Raises:
        UserError: The file lacks a class that was found.
    """
    if names_file is None:
        return tuple(sorted(found))
    names = read_class_names(names_file)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise UserError(
            f"{names_file} lacks {len(unknown)} classes of the dataset, the first is {unknown[0]!r}; add them, or "
            "leave out --class-names"
        )
    return names


def _printable(name: str) -> str:
    return name if can_be_listed(Path(name)) else repr(name)


def _describe_oddities(
    rows: dict[str, list[VideoRow]], class_names: tuple[str, ...], num_ambiguous: int
) -> list[str]:
    notes = []
    labels = {split: Counter(row.label for row in listed) for split, listed in rows.items()}
    for split, counts in labels.items():
        if UNLABELLED in counts:
            notes.append(f"{counts[UNLABELLED]} videos of {split} have no label (-1); they cannot be scored")
    trained = labels.get("train")
    if trained and class_names:
        scored = set().union(*labels.values()) - set(trained) - {UNLABELLED}
        if scored:
            names = ", ".join(class_names[label] for label in sorted(scored)[:5])
            notes.append(f"{len(scored)} classes of val or test have no training video, e.g. {names}")
    splits_of = Counter(cut for listed in rows.values() for cut in {row.part for row in listed})
    shared = sorted(str(cut[0]) for cut, count in splits_of.items() if count > 1)
    if shared:
        notes.append(f"{len(shared)} videos are in more than one split, the first is {shared[0]}")
    if num_ambiguous:
        notes.append(
            f"{num_ambiguous} names have several files; the first by path is listed, the others are left out"
        )
    return notes
