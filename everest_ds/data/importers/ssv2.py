"""Something-Something v2: numbered webm files, and the JSON files of the annotations.

Files, with or without the prefix ``something-something-v2-``: train.json and validation.json, lists of objects with
``id`` and ``template`` (``Holding [something] next to [something]``; class names have no brackets); test.json, the
same with ``id`` only; and labels.json, an object from class names to labels as text. Test videos get labels from
the later test-answers.csv (``id;template``) if it is there, otherwise -1.
"""

from dataclasses import dataclass
from pathlib import Path

from everest_ds.data.importers.collector import UNLABELLED, Collector, Import
from everest_ds.data.importers.source_tree import (
    SourceTree,
    annotations_of,
    one_file,
    read_entries,
    read_json,
    read_lines,
)
from everest_ds.errors import UserError

_PREFIX = r"(?:something-something-v2-)?"
_FILES = {
    split: (rf"{_PREFIX}{word}\.json", f"{word}.json")
    for split, word in (("train", "train"), ("val", "validation"), ("test", "test"))
}


@dataclass(frozen=True, kw_only=True)
class Ssv2Options:
    """Options of `everest index ssv2`."""

    annotations: Path | None = None
    """Folder of labels.json, train.json, validation.json and test.json, if it is not below SRC."""


def collect(source: SourceTree, options: Ssv2Options) -> Import:
    """Return the videos of the splits that have a file."""
    annotations = annotations_of(source, options.annotations)
    labels = _read_labels(one_file(annotations, rf"{_PREFIX}labels\.json", "labels.json"))
    answers = _read_answers(annotations, labels)
    collector = Collector(source)
    for split, path in collector.find_split_files(annotations, _FILES).items():
        keys = ("id",) if split == "test" else ("id", "template")
        for place, entry in read_entries(path, "videos", *keys):
            name = str(entry["id"])
            label = answers.get(name, UNLABELLED)
            if "template" in entry:
                label = _label_of(entry["template"], labels, place)
            collector.add(split, name, source.find_video(name), label)
    return collector.finish(tuple(labels))


def _read_labels(path: Path) -> dict[str, int]:
    """Return labels by class name, ordered by label."""
    given = read_json(path)
    try:
        labels = {str(name): int(label) for name, label in given.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f'{path}: expected an object like {{"Opening something": "0"}}: {error}') from error
    if sorted(labels.values()) != list(range(len(labels))) or not labels:
        raise UserError(f"{path}: expected the labels 0 to {len(labels) - 1}, each once; download it again")
    return dict(sorted(labels.items(), key=lambda item: item[1]))


def _read_answers(annotations: SourceTree, labels: dict[str, int]) -> dict[str, int]:
    pattern = rf"{_PREFIX}test-answers\.csv"
    if not annotations.find_files(pattern):
        return {}
    path = one_file(annotations, pattern, "test-answers.csv")
    answers = {}
    for number, line in read_lines(path):
        name, separator, template = line.partition(";")
        if not separator:
            raise UserError(f"{path}, line {number}: {line!r}; expected `id;template`")
        answers[name.strip()] = _label_of(template.strip().strip('"'), labels, f"{path}, line {number}")
    return answers


def _label_of(template: str, labels: dict[str, int], place: str) -> int:
    name = str(template).replace("[", "").replace("]", "")
    if name not in labels:
        raise UserError(f"{place}: {template!r} is not in labels.json; use annotation files of one release")
    return labels[name]
