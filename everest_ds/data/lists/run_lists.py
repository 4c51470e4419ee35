"""Reading and checking the lists of a run, before anything heavy is imported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from everest_ds.config import Config, FinetuneConfig
from everest_ds.data.lists.classes import Classes, require_known_labels, resolve_classes
from everest_ds.data.lists.node_sharing import read_on_node
from everest_ds.data.lists.video_list import (
    PackedRows,
    VideoPart,
    VideoRow,
    describe_repeats,
    read_list,
    require_reachable,
)
from everest_ds.distributed import World
from everest_ds.errors import UserError

ALONE = World(rank=0, local_rank=0, size=1, local_size=1)


@dataclass(frozen=True, kw_only=True)
class Lists:
    """The lists of a run.

    Attributes:
        config: Configuration of the run, with data.num_classes filled in.
        train: Training videos.
        val: Videos that score the model during training; None without a list.
        classes: The classes; None in pre-training.
        note: Oddities of the lists to print, such as duplicate rows; None if there are none.
    """

    config: Config
    train: Sequence[VideoRow]
    val: Sequence[VideoRow] | None = None
    classes: Classes | None = None
    note: str | None = None


def read_lists(config: Config, world: World = ALONE) -> Lists:
    """Read the lists that a configuration names; long ones once for all ranks of a machine.

    Raises:
        UserError: A list is missing, empty or names no existing files, or a label does not fit the classes.
    """
    train_list = config.data.train_list
    if train_list is None:
        raise UserError(
            "data.train_list is not set; add --data.train-list FILE (`everest demo-data DIR` makes one to try)"
        )
    read = partial(_read, quarantine=config.data.quarantine, world=world)
    train = read(train_list)
    if not isinstance(config, FinetuneConfig):
        return Lists(config=config, train=train, note="; ".join(_describe_repeats({train_list: train})) or None)
    data = config.data
    classes = resolve_classes(train, Path(train_list), data.class_names, data.num_classes)
    trained = set(np.unique(train.labels).tolist())
    others = {}
    for name in (data.val_list, data.test_list):
        if name is not None:
            others[name] = read(name)
            require_known_labels(others[name], Path(name), classes, trained)
    notes = _describe_repeats({train_list: train, **others})
    if untrained := classes.untrained(trained):
        notes.append(f"no training video for {classes.describe_all(untrained)}")
    return Lists(
        config=replace(config, data=replace(data, num_classes=classes.num)),
        train=train,
        val=others.get(data.val_list or ""),
        classes=classes,
        note="; ".join(notes) or None,
    )


def _read_quarantine(name: str | None) -> set[VideoPart]:
    """Return the videos to leave out; the file may be empty, as `everest check-data` writes it for a good list."""
    if name is None or (Path(name).is_file() and Path(name).stat().st_size == 0):
        return set()
    return {_resolved(row) for row in read_list(Path(name))}


def _read(name: str, *, quarantine: str | None, world: World) -> PackedRows:
    path = Path(name)
    files = [path] if quarantine is None else [path, Path(quarantine)]
    rows = read_on_node(files, lambda: _read_kept(path, quarantine), world)
    if not rows:
        raise UserError(f"data.quarantine leaves no video of {path}; check that it is the right quarantine")
    require_reachable(rows, path)
    return rows


def _read_kept(path: Path, quarantine: str | None) -> PackedRows:
    """Read a list without the quarantined videos; real paths are looked up only if there is a quarantine."""
    rows, left_out = read_list(path), _read_quarantine(quarantine)
    if not left_out:
        return rows
    return rows.kept(np.fromiter((_resolved(row) not in left_out for row in rows), bool, len(rows)))


def _resolved(row: VideoRow) -> VideoPart:
    """Return a row's video and window with its real path, which is independent of the list's folder."""
    return row.real_path, row.start_s, row.end_s


def _describe_repeats(lists: Mapping[str, Sequence[VideoRow]]) -> list[str]:
    return [f"{name}: {note}" for name, rows in lists.items() if (note := describe_repeats(rows)) is not None]
