"""The loader's speed: which batches are timed. The loader is a fake."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everest_ds.benchmark import data
from everest_ds.config import FinetuneConfig, PretrainConfig
from everest_ds.data.clips.dataset import ClipDataset
from everest_ds.data.clips.sampling import SampleKey
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.recipes import RECIPES
from everest_ds.train.tasks import Task, make_task


@dataclass
class RecordingLoader:
    """A fake loader: its batches have as many clips as its sampler has keys."""

    batches: list[list[SampleKey]] = field(default_factory=list)

    def __call__(self, dataset: ClipDataset, sampler: object, *, micro_size: int, pin_memory: bool) -> list[Batch]:
        assert not pin_memory
        self.batches = list(sampler)  # type: ignore[call-overload]
        assert {len(keys) for keys in self.batches} == {micro_size}
        assert max(key.index for batch in self.batches for key in batch) < len(dataset)
        return [Batch(torch.empty(len(keys))) for keys in self.batches]


@dataclass
class Batch:
    index_B: Tensor

    def require_whole(self) -> None:
        assert len(self.index_B)


def meta_task(config: PretrainConfig | FinetuneConfig, workers: int, repeats: int) -> Task:
    changed: Any = replace(config.data, num_workers=workers, reader="pyav", repeats=repeats)
    batch = replace(config.batch, global_size=12 * repeats, micro_size=2 * repeats)
    with torch.device("meta"):
        return make_task(replace(config, data=changed, batch=batch))


@pytest.mark.parametrize(
    ("recipe", "workers", "repeats", "asked", "got"),
    [
        ("demo", 2, 1, 3, 3),
        ("demo", 1, 4, 6, 4),  # a batch contains all clips of its videos
        ("demo", 3, 4, 2, 4),
        ("demo_ft", 1, 3, 5, 6),  # mixing needs pairs
        ("demo_ft", 1, 1, 8, 8),  # more clips than rows
    ],
)
def test_loader_is_timed_from_a_batch_of_each_worker_on(
    recipe: str,
    workers: int,
    repeats: int,
    asked: int,
    got: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fake clock advances by one second after the warm-up: the rate is the number of clips after it."""
    config = RECIPES[recipe]()
    if isinstance(config, FinetuneConfig):
        config = replace(config, data=replace(config.data, num_classes=8, mixup_alpha=0.8))
    loader = RecordingLoader()
    monkeypatch.setattr(data, "make_loader", loader)
    rate = data.loader_clips_per_s(
        meta_task(config, workers, repeats),
        [VideoRow(Path(f"{number}.mp4"), 0) for number in range(5)],
        batch_size=asked,
        now=partial(next, itertools.count()),
    )
    assert {len(batch) for batch in loader.batches} == {got}
    assert len(loader.batches) == 5 * workers
    assert rate == 4 * workers * got
