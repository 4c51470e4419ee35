"""Folders of classes: SRC/CLASS/video, or SRC/{train,val,test}/CLASS/video; videos may be at any depth in a class.

Without folders of splits, each video gets a random number from the seed and its path below SRC. A number below the
test share means test, one below the sum of the test and val shares val, any other train. So shares are met on
average, and a video stays in its split when others are added or removed. If a split would get no video of a class
that has at least as many videos as there are splits, the video with the nearest number is moved there; it may move
back when videos are added. The video of a class with the highest number is always in train.

Videos without folders of classes (SRC/video, or SRC/{train,val,test}/video) become lists for pre-training, without
labels. Classes are numbered in the order of their names; if all names are whole numbers, in numeric order.
"""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from everest_ds.data.importers.collector import SPLITS, UNLABELLED, Collector, Import, resolve_names, split_of
from everest_ds.data.importers.source_tree import SourceTree
from everest_ds.data.lists.list_line import VIDEO_SUFFIXES
from everest_ds.errors import UserError

_IN_NO_CLASS = "a video in no class's folder"
_IN_NO_SPLIT = "a video outside the folders of the splits"
_NUM_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Options of `everest index folder`; shares and seed have no effect if SRC has folders train, val or test."""

    val_share: float = 0.1
    """Share of each class's videos for val.csv; 0 for no val.csv."""
    test_share: float = 0.1
    """Share of each class's videos for test.csv; 0 for no test.csv."""
    seed: int = 0
    """Seed of the split."""
    class_names: Path | None = None
    """File with one class name a line, in the order of the labels; without it, labels follow the order of the names
    (numeric order if all are whole numbers)."""

    def __post_init__(self) -> None:
        for name in ("val_share", "test_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be from 0 to below 1")
        if self.val_share + self.test_share >= 1:
            raise UserError(
                f"val_share={self.val_share} and test_share={self.test_share} leave no video for training; their "
                "sum must be below 1"
            )


def collect(source: SourceTree, options: FolderOptions) -> Import:
    """Return the videos below folders of classes, assigned to splits; without such folders, without labels."""
    collector = Collector(source)
    if not source.videos:
        raise UserError(
            f"{source.root} contains no video: no file in it or below it ends in one of "
            f"{', '.join(VIDEO_SUFFIXES)}; expected CLASS/video, or videos without class folders for pre-training"
        )
    every = [names for path in source.videos if (names := source.folders_of(path))]
    if all(len(names) == 1 and split_of(names[0]) for names in every):  # or all videos are in SRC itself
        return _collect_unlabelled(collector, source, options)
    given = _has_splits(every)
    by_class: dict[str, list[tuple[Path, str | None]]] = defaultdict(list)
    for path in source.videos:
        folders = source.folders_of(path)
        split = split_of(folders[0]) if given and folders else None
        name = source.name_of(path)
        if given and split is None:
            collector.leave_out(_IN_NO_SPLIT, name, path)
        elif len(folders) <= given:
            collector.leave_out(_IN_NO_CLASS, name, path)
        else:
            by_class[folders[given]].append((path, split))
    class_names, are_numbers = _order_classes(by_class, options)
    splits: dict[str, set[str]] = defaultdict(set)
    for label, class_name in enumerate(class_names):
        members = by_class.get(class_name, [])
        dealt = {path: split for path, split in members if split} or _deal(
            source, [path for path, _ in members], options
        )
        for path, split in dealt.items():
            collector.add(split, source.name_of(path), path, label)
            splits[split].add(class_name)
    drawn = (
        f"splits are drawn by class with seed {options.seed}: test {options.test_share:g}, "
        f"val {options.val_share:g}, the rest for training"
    )
    collector.note("splits are the dataset's own folders" if given else drawn)
    if are_numbers:
        collector.note(
            f"class folders are numbers, so labels follow the numeric order: {class_names[0]} has label 0, "
            f"{class_names[-1]} has label {len(class_names) - 1}"
        )
    for note in _describe_absent(splits, by_class, () if given else _drawn_splits(options)):
        collector.note(note)
    return collector.finish(class_names)


def _collect_unlabelled(collector: Collector, source: SourceTree, options: FolderOptions) -> Import:
    """Return videos without classes: all in train, or in the splits whose folders contain them."""
    if options.class_names is not None:
        raise UserError(
            f"--class-names {options.class_names} has no effect: {source.root} has no folders of classes; remove it"
        )
    has_folders = any(map(source.folders_of, source.videos))
    for path in source.videos:
        folders, name = source.folders_of(path), source.name_of(path)
        split = split_of(folders[0]) if folders else None if has_folders else "train"
        if split is None:
            collector.leave_out(_IN_NO_SPLIT, name, path)
        else:
            collector.add(split, name, path, UNLABELLED)
    collector.note(f"{source.root} has no folders of classes: the lists are for pre-training, every label is -1")
    if not has_folders:
        collector.note("videos without classes are not split: --val-share and --test-share have no effect")
    return collector.finish(())


def _has_splits(folders: list[tuple[str, ...]]) -> bool:
    """Return whether the first folders are splits; ``folders`` are the folders of each video, from SRC down.

    They are if one has a split's name and contains folders of classes. If there are other first folders too, all
    with a split's name must contain only folders of classes.
    """
    depths = [len(names) for names in folders if split_of(names[0])]
    return bool(depths) and (min(depths) > 1 or (max(depths) > 1 and len(depths) == len(folders)))


def _order_classes(found: Mapping[str, object], options: FolderOptions) -> tuple[tuple[str, ...], bool]:
    """Return the class names by label, and whether they are whole numbers in numeric order."""
    are_numbers = options.class_names is None and all(re.fullmatch("[0-9]+", name) for name in found)
    if are_numbers:
        return tuple(sorted(found, key=lambda name: (int(name), name))), True
    return resolve_names(found.keys(), options.class_names), False


def _drawn_splits(options: FolderOptions) -> tuple[str, ...]:
    shares = {"train": 1.0, "val": options.val_share, "test": options.test_share}
    return tuple(split for split in SPLITS if shares[split] > 0)


def _deal(source: SourceTree, paths: list[Path], options: FolderOptions) -> dict[Path, str]:
    """Return the split of each video of a class; see the module."""
    draws = {path: _draw(options.seed, path.relative_to(source.root)) for path in paths}
    ordered = sorted(paths, key=lambda path: (draws[path], path))
    num_test = sum(draw < options.test_share for draw in draws.values())
    num_scored = min(sum(draw < options.test_share + options.val_share for draw in draws.values()), len(paths) - 1)
    if len(paths) >= len(_drawn_splits(options)):
        num_test = max(num_test, options.test_share > 0)
        num_scored = max(num_scored, num_test + (options.val_share > 0))
        num_scored = min(num_scored, len(paths) - 1)
        num_test = min(num_test, num_scored - (options.val_share > 0))
    num_test = min(num_test, num_scored)
    scored = dict.fromkeys(ordered[:num_test], "test") | dict.fromkeys(ordered[num_test:num_scored], "val")
    return {path: scored.get(path, "train") for path in paths}


def _describe_absent(
    splits: Mapping[str, Collection[str]], by_class: Mapping[str, object], wanted: Collection[str]
) -> Iterator[str]:
    """Describe classes without a video in val or test; those without training videos are reported elsewhere."""
    for split in SPLITS[1:]:
        absent = [name for name in by_class if name not in splits.get(split, ())]
        if absent and (split in splits or split in wanted):
            reason = f" (fewer than {len(wanted)} videos each)" if split in wanted else ""
            shown = ", ".join(sorted(absent)[:_NUM_SHOWN]) + (", ..." if len(absent) > _NUM_SHOWN else "")
            yield f"{split} has no video of {len(absent)} of {len(by_class)} classes{reason}: {shown}"


def _draw(seed: int, path: Path) -> float:
    """Return a number in [0, 1) that depends on the seed and the path only."""
    digest = hashlib.sha256(b"%d\0" % seed + os.fsencode(path.as_posix())).digest()
    return int.from_bytes(digest[:6]) / 2**48
