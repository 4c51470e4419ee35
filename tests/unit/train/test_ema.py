"""The moving average without ZeRO: one process, a plain module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from everest_ds.errors import UserError
from everest_ds.model.weights.reading import Weights
from everest_ds.train.checkpoints.save import AVERAGE
from everest_ds.train.checkpoints.saving.files import FilesInFolder
from everest_ds.train.ema import WeightAverage, averaged, read_average


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_engine(width: int = 3) -> SimpleNamespace:
    module = torch.nn.ModuleDict({"model": torch.nn.Linear(width, 2)})
    return SimpleNamespace(module=module, device=torch.device("cpu"), optimizer=None)


def test_average_of_a_known_sequence() -> None:
    engine = make_engine()
    bias = engine.module["model"].bias
    with torch.no_grad():
        bias.zero_()
        average = WeightAverage(engine, 0.9)
        for value in (1.0, 2.0):
            bias.fill_(value)
            average.update(torch.tensor(True))
        bias.fill_(5.0)
        average.update(torch.tensor(False))  # a skipped step
        bias.fill_(2.0)
    assert dict(average.whole())["bias"].tolist() == pytest.approx([0.9 * 0.1 + 0.1 * 2] * 2)
    with average.swapped():
        assert bias.tolist() == pytest.approx([0.29, 0.29])
    assert bias.tolist() == [2.0, 2.0]


def test_error_inside_a_swap_comes_out() -> None:
    with pytest.raises(UserError, match="unreadable"), WeightAverage(make_engine(), 0.9).swapped():
        raise UserError("unreadable")


def test_frozen_weights_are_not_averaged(tmp_path: Path) -> None:
    engine = make_engine()
    engine.module["model"].weight.requires_grad_(False)
    WeightAverage(engine, 0.9).write_checkpoint(FilesInFolder(tmp_path))
    assert list(read_average(tmp_path)) == ["bias"]


def test_averages_of_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no ema\.safetensors: the run was trained without optim\.ema_decay"):
        WeightAverage(make_engine(), 0.9).load(tmp_path)
    WeightAverage(make_engine(4), 0.9).write_checkpoint(FilesInFolder(tmp_path))
    with pytest.raises(UserError, match="does not match the trained weights: weight"):
        WeightAverage(make_engine(), 0.9).load(tmp_path)


def test_file_that_cannot_be_written_is_the_disks_fault(tmp_path: Path) -> None:
    (tmp_path / AVERAGE).mkdir()
    with pytest.raises(OSError, match="directory"):
        WeightAverage(make_engine(), 0.9).write_checkpoint(FilesInFolder(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04c__builtin__\neval\n.", "cannot be read"),
        ((2**50).to_bytes(8, "little"), "its header claims"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "w is complex"),
        ({"head.weight": torch.ones(2, dtype=torch.int8)}, "head.weight is int8"),
        ({"w": torch.tensor([float("nan")])}, "w has 1 NaN"),
    ],
)
def test_average_that_is_none_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / AVERAGE
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    weights = Weights(source="w", layout="", tensors={}, architecture=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        averaged(weights, tmp_path)
