"""Folders of classes: SRC/CLASS/video, or SRC/{train,val,test}/CLASS/video; videos may lie at any depth in a class.

Without folders of splits each video is dealt to one by a draw that hangs on the seed and its own path below SRC
alone: it stays where it is when others are added or taken away. So the shares are met on average, not exactly. A
class's video with the highest draw always trains, so that no class is scored without having been trained.
"""

import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from everest_ds.data.importers.gathering import Gathering, Import, resolve_names, split_of
from everest_ds.data.importers.tree import SourceTree
from everest_ds.errors import UserError

_IN_NO_CLASS = "a video in no class's folder"
_IN_NO_SPLIT = "a video outside the folders of the splits"


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Options of `everest index folder`; shares and seed are for folders without train, val and test."""

    val_share: float = 0.1
    """Share of the videos for val.csv, 0 for none."""
    test_share: float = 0.1
    """Share of the videos for test.csv, 0 for none."""
    seed: int = 0
    """Seed of the split."""
    class_names: Path | None = None
    """File with one class name a line, in the order of the labels; by name without one."""

    def __post_init__(self) -> None:
        """Check the shares."""
        for name in ("val_share", "test_share"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be from 0 to below 1")
        if self.val_share + self.test_share >= 1:
            raise UserError(
                f"val_share={self.val_share} and test_share={self.test_share} leave nothing for training; together "
                "they must be below 1"
            )


def gather(source: SourceTree, options: FolderOptions) -> Import:
    """Return the videos below folders of classes, dealt to splits.

    Raises:
        UserError: There is no video in a folder of a class.
    """
    gathering = Gathering(source)
    given = _has_splits(source)
    by_class: dict[str, list[tuple[Path, str | None]]] = defaultdict(list)
    for path in source.videos:
        folders = source.folders_of(path)
        split = split_of(folders[0]) if given and folders else None
        name = str(path.relative_to(source.root))
        if given and split is None:
            gathering.leave_out(_IN_NO_SPLIT, name, path)
        elif not folders:
            gathering.leave_out(_IN_NO_CLASS, name, path)
        else:
            by_class[folders[1] if given else folders[0]].append((path, split))
    if not by_class:
        raise UserError(
            f"{source.root} holds no CLASS/video; put the videos into a folder for each class (for pre-training "
            "alone into one)"
        )
    class_names = resolve_names(by_class.keys(), options.class_names)
    for label, class_name in enumerate(class_names):
        members = by_class.get(class_name, [])
        dealt = {path: split for path, split in members if split} or _deal(
            source, [path for path, _ in members], options
        )
        for path, split in dealt.items():
            gathering.add(split, str(path.relative_to(source.root)), path, label)
    gathering.note("splits are the dataset's own folders" if given else _describe(options))
    return gathering.finish(class_names)


def _has_splits(source: SourceTree) -> bool:
    """Say whether the first folders are splits: one is called so, and all that are have folders of classes."""
    depths = [
        len(folders) for path in source.videos if (folders := source.folders_of(path)) and split_of(folders[0])
    ]
    return bool(depths) and min(depths) > 1


def _deal(source: SourceTree, paths: list[Path], options: FolderOptions) -> dict[Path, str]:
    draws = {path: _draw(options.seed, path.relative_to(source.root)) for path in paths}
    trained = max(draws, key=lambda path: (draws[path], path), default=None)
    splits = {}
    for path, draw in draws.items():
        if path == trained or draw >= options.test_share + options.val_share:
            splits[path] = "train"
        else:
            splits[path] = "test" if draw < options.test_share else "val"
    return splits


def _draw(seed: int, path: Path) -> float:
    """Return a number from 0 to below 1 that belongs to a seed and a path."""
    digest = hashlib.sha256(b"%d\0" % seed + os.fsencode(path.as_posix())).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _describe(options: FolderOptions) -> str:
    return (
        f"splits are drawn with seed {options.seed}: test {options.test_share:g}, val {options.val_share:g}, "
        "the rest for training"
    )
