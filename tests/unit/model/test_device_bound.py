"""Forward passes ask nothing of the device: torch's fake tensors on a GPU that is not there refuse what would.

A fake tensor has shape, type and device but no values: whatever needs a value on the host, or a shape that depends
on values, is an error. Copies between host and device are looked at here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from everest_ds.config import FinetuneConfig, PretrainConfig
from everest_ds.model import attention, tubelets
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.packing import TokenSet
from everest_ds.recipes import get_recipe
from everest_ds.train.selecting import num_pretrain_noise
from everest_ds.train.tasks import Task, make_task

REFUSED = (DataDependentOutputException, DynamicOutputShapeException)


@pytest.fixture(autouse=True)
def flash_kernel_of_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA asks the driver which kernel serves; the kernel itself needs shapes alone."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    monkeypatch.setattr(attention, "_dense", lambda q, k, v: kernel(q, k, v)[0])


class NoWaitedCopies(TorchDispatchMode):
    """Refuses copies to the host, and copies to the device that the host waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        before, after = (
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
            for tree in ((args, kwargs), out)
        )
        if "cuda" in before and "cpu" in after:
            raise AssertionError(f"{func} brings a tensor to the host")
        if before == {"cpu"} and "cuda" in after and not kwargs.get("non_blocking"):
            raise AssertionError(f"{func} copies a tensor to the device and waits")
        return out


def make_inputs(task: Task, config: PretrainConfig | FinetuneConfig) -> tuple[torch.Tensor, ...]:
    edge = config.data.image_size

    def clips(frames: int) -> torch.Tensor:
        return torch.empty((3, 3, frames, edge, edge), dtype=torch.uint8, device="cuda")

    if isinstance(config, PretrainConfig):
        return clips(config.candidate_frames), torch.empty((3, num_pretrain_noise(config)), device="cuda")
    assert isinstance(task.model, EverestClassifier)
    num_noise = task.model.num_noise(config.grid)
    label_B = torch.empty(3, dtype=torch.int64, device="cuda")
    return clips(config.data.num_frames), label_B, torch.empty((3, num_noise), device="cuda")


def forward(config: PretrainConfig | FinetuneConfig) -> torch.Tensor:
    """Return the loss of a micro-batch of three clips in bfloat16 on a GPU that is not there."""
    with torch.device("meta"):
        task = make_task(config).to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        task = task.to_empty(device="cuda")
        inputs = make_inputs(task, config)
        with NoWaitedCopies():
            loss: torch.Tensor = task(*inputs)
    return loss


def is_scalar_on_the_gpu(loss: torch.Tensor) -> bool:
    return loss.device.type == "cuda" and loss.shape == ()


def pretraining(**selection: Any) -> PretrainConfig:
    config = get_recipe("demo")
    assert isinstance(config, PretrainConfig)
    return replace(config, selection=replace(config.selection, **selection))


@pytest.mark.parametrize(
    "selection",
    [
        {},
        {"alpha": 1.5},
        {"targets": "all"},
        {"strategy": "random"},
        {"strategy": "tube"},
    ],
    ids=str,
)
def test_pretraining_keeps_to_the_device(selection: dict[str, Any]) -> None:
    assert is_scalar_on_the_gpu(forward(pretraining(**selection)))


def test_ranking_by_exact_products_keeps_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried out on a real GPU before it is used; here it is taken to serve."""
    monkeypatch.setattr(tubelets, "has_exact_matmul", lambda device: True)
    assert is_scalar_on_the_gpu(forward(pretraining()))


def test_finetuning_keeps_to_the_device() -> None:
    config = get_recipe("demo_ft")
    assert isinstance(config, FinetuneConfig)
    model = replace(config.model, drop_path=0.1)
    assert is_scalar_on_the_gpu(forward(replace(config, model=model, data=replace(config.data, num_classes=8))))


def test_budgets_that_clips_share_ask_the_device_for_their_counts() -> None:
    """How many tokens each clip keeps, only the device knows."""
    with pytest.raises((AssertionError, *REFUSED)):
        forward(pretraining(budget="batch"))


def test_what_would_wait_is_refused() -> None:
    with FakeTensorMode():
        mask_BN = torch.empty((2, 8), dtype=torch.bool, device="cuda")
        with pytest.raises(REFUSED):
            mask_BN.nonzero()
        with pytest.raises(REFUSED):
            float(torch.empty((), device="cuda"))
        with NoWaitedCopies(), pytest.raises((AssertionError, *REFUSED)):
            TokenSet.from_mask(mask_BN)
        TokenSet.from_mask(mask_BN, [3, 4])
        with NoWaitedCopies(), pytest.raises(AssertionError, match="brings a tensor to the host"):
            mask_BN.cpu()
        with NoWaitedCopies(), pytest.raises(AssertionError, match="and waits"):
            torch.empty(2).to("cuda")
