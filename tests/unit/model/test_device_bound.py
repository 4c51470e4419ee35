"""Forward and backward read nothing from the device and copy nothing to it, as a CUDA graph requires.

A fake tensor has shape, type and device but no values: torch raises an error if the host needs a value, or if a
shape depends on values. `DeviceBound` refuses the rest. Forward runs on fake CUDA tensors. Backward would need a
real GPU, so it runs on fake CPU tensors.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.model import attention, transformer, tubelets
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.packing import TokenSet
from everest_ds.recipes import RECIPES, get_recipe
from everest_ds.tokens import DistanceName, StrategyName
from everest_ds.train.precision import PRECISIONS, Precision
from everest_ds.train.selecting import num_pretrain_noise
from everest_ds.train.tasks import Task, make_task

REFUSED = (AssertionError, DataDependentOutputException, DynamicOutputShapeException)
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)
DISTANCES: tuple[DistanceName, ...] = get_args(DistanceName)


class DeviceBound(TorchDispatchMode):
    """Refuses tensors on other devices, tensors made from host numbers, and random draws; counts the rest."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor is made of the host's numbers"
        out = func(*args, **kwargs)
        found = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        assert found <= {self.device_type}, f"{func} has tensors on {found}"
        assert torch.Tag.nondeterministic_seeded not in func.tags or drops_nothing(func, args, kwargs), (
            f"{func} draws"
        )
        self.num_operators += 1
        return out


def drops_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operator with dropout has a dropout rate of 0, so that it draws nothing."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in ("p", "dropout_p"):
            rate = args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(rate == 0)
    return False


def make_inputs(task: Task, config: Config, device_type: str) -> tuple[torch.Tensor, ...]:
    """Return the task's inputs for a micro-batch of four clips."""
    edge = config.data.image_size

    def clips(frames: int) -> torch.Tensor:
        return torch.empty((4, 3, frames, edge, edge), dtype=torch.uint8, device=device_type)

    if isinstance(config, PretrainConfig):
        return clips(config.candidate_frames), torch.empty((4, num_pretrain_noise(config)), device=device_type)
    assert isinstance(config, FinetuneConfig)
    assert isinstance(task.model, EverestClassifier)
    target = torch.empty(4, dtype=torch.int64, device=device_type)
    if config.data.mixes:
        target = torch.empty(4, task.model.num_classes, device=device_type)
    return (
        clips(config.data.num_frames),
        target,
        torch.empty((4, task.model.num_noise(config.grid)), device=device_type),
    )


@contextlib.contextmanager
def casting(precision: Precision, device_type: str) -> Iterator[None]:
    """Enable autocast if the precision does. `torch.autocast` itself refuses cuda without a GPU."""
    before = torch.is_autocast_enabled(device_type)
    torch.set_autocast_dtype(device_type, torch.bfloat16)
    torch.set_autocast_enabled(device_type, precision.autocasts)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before)


def follow(config: Config, precision: str = "bf16", *, backward: bool = False) -> int:
    """Return the number of operators of a micro-batch: of forward on CUDA, or of backward on the CPU."""
    device_type, computes = "cpu" if backward else "cuda", PRECISIONS[precision]
    if isinstance(config, FinetuneConfig):
        config = replace(config, data=replace(config.data, num_classes=8))
    with torch.device("meta"):
        task = make_task(config).to(computes.weights_dtype)
    bound = DeviceBound(device_type)
    with FakeTensorMode(allow_non_fake_inputs=True):
        task = task.to_empty(device=device_type)
        inputs = make_inputs(task, config, device_type)
        with bound:
            with casting(computes, device_type):
                loss: torch.Tensor = task(*inputs)
            if backward:
                bound.num_operators = 0
                loss.backward()
    assert loss.shape == ()
    assert loss.device.type == device_type
    assert not backward or all(p.grad is not None for p in task.parameters() if p.requires_grad)
    return bound.num_operators


def recipe(name: str, *, model: dict[str, Any] | None = None, **selection: Any) -> Config:
    """Return a recipe with other settings of its model and selection."""
    config = get_recipe(name)
    return replace(
        config,
        model=replace(config.model, **(model or {})),  # type: ignore[arg-type]
        selection=replace(config.selection, **selection),  # type: ignore[arg-type]
    )


def settings_of(config: Config) -> list[dict[str, Any]]:
    """Return the selection settings that a recipe allows: strategies, distances, and frame selection."""
    is_pretraining, found = isinstance(config, PretrainConfig), []
    for strategy, alpha in itertools.product(STRATEGIES, (1.0, 1.5) if is_pretraining else (1.0,)):
        measures = strategy == "rero" or alpha > 1
        ratio = {"all": 1.0, "running_cell": 0.5}.get(strategy, 0.3)
        for distance in DISTANCES if measures else ("l2",):
            ratios = {"selected_ratio": ratio, "alpha": alpha} if is_pretraining else {"keep_ratio": ratio}
            found.append({"strategy": strategy, "distance": distance, **ratios})
    return found


@pytest.fixture(autouse=True)
def flash_kernel_of_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the flash kernel in place of SDPA on CUDA: SDPA queries the driver, the kernel needs only shapes."""
    flash, dense = torch.ops.aten._scaled_dot_product_flash_attention, attention._dense
    monkeypatch.setattr(attention, "_dense", lambda q, k, v: flash(q, k, v)[0] if q.is_cuda else dense(q, k, v))


@pytest.fixture(autouse=True)
def no_state_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse reading a generator's state and synchronising, which are errors during capture."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the host asks for the state of a generator, or waits")

    for module, name in ((torch, "get_rng_state"), (torch.cuda, "get_rng_state"), (torch.cuda, "synchronize")):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_keeps_to_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks tokens by exact matmuls, which a real GPU is tested for before use; the tests below rank by pixels."""
    monkeypatch.setattr(tubelets, "has_exact_matmul", lambda device: True)
    assert follow(recipe(name, model={"size": "nano"})) > 100  # all sizes use the same blocks


MANY = list(itertools.product((1, 2, 3), PRECISIONS))


@pytest.mark.parametrize("name", ["oscc_vit_b", "ssv2_vit_b_ft"])
@pytest.mark.parametrize("part", range(len(MANY)))
def test_every_selection_keeps_to_the_device(name: str, part: int) -> None:
    """Settings of selection are spread over all pairs of embedding layers and precision."""
    layers, precision = MANY[part]
    model = {"size": "nano", "embedding_layers": layers}
    for settings in settings_of(get_recipe(name))[part :: len(MANY)]:
        assert follow(recipe(name, model=model, **settings), precision) > 100, settings


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_with_every_setting_keeps_to_the_device(name: str) -> None:
    for settings, (layers, precision) in itertools.product(settings_of(get_recipe(name)), MANY):
        model = {"size": "nano", "embedding_layers": layers}
        assert follow(recipe(name, model=model, **settings), precision) > 100, settings


@pytest.mark.parametrize(
    "changed",
    [
        {"targets": "selected"},
        {"order": "ascending"},
        {"model": {"position_frames": 32}},
        {"model": {"activation_checkpointing": True, "recompute_attention": False}},
    ],
    ids=str,
)
def test_further_settings_keep_to_the_device(changed: dict[str, Any]) -> None:
    assert follow(recipe("demo", **changed)) > 100


@pytest.mark.parametrize(
    "model", [{"drop_path": 0.1}, {"freeze_encoder": True}, {"activation_checkpointing": True}], ids=str
)
def test_finetuning_keeps_to_the_device(model: dict[str, Any]) -> None:
    config = recipe("demo_ft", model=model)
    assert follow(replace(config, data=replace(config.data, mixup_alpha=0.8))) > 100  # type: ignore[arg-type]


CHECKPOINTING = {
    "keeps": {},
    "recomputes": {"activation_checkpointing": True},
    "recomputes but attention": {"activation_checkpointing": True, "recompute_attention": False},
}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", ["oscc_vit_b", "ssv2_vit_b_ft"])
def test_backward_asks_nothing_of_the_device(name: str, checkpointing: str) -> None:
    """Selection precedes the trained weights, so backward only sees its index tensors."""
    model = {"size": "nano", **CHECKPOINTING[checkpointing]}
    for precision, layers in zip(PRECISIONS, (1, 2, 3), strict=True):
        config = recipe(name, model={**model, "embedding_layers": layers})
        assert follow(config, precision, backward=True) > 100, precision


def test_budgets_that_clips_share_ask_the_device_for_their_counts() -> None:
    """Only the device knows how many tokens each clip keeps."""
    for budget in ("batch", "threshold"):
        with pytest.raises(REFUSED):
            follow(recipe("demo", budget=budget))


OnTheGpu = Callable[[torch.Tensor], object]
FAULTS: dict[str, OnTheGpu] = {
    "a constant": lambda x: x * torch.tensor(2.0, device="cuda"),
    "a constant, not waited for": lambda x: x * torch.tensor([2.0]).to("cuda", non_blocking=True),
    "a scalar of the host": lambda x: x * torch.tensor(2.0),
    "a list as index": lambda x: x[[0, 2]],
    "an array": lambda x: torch.from_numpy(np.zeros(8)).to("cuda"),
    "a copy to the host": lambda x: x.cpu(),
    "a value": lambda x: float(x[0]),
    "a truth": lambda x: bool((x > 0).all()),
    "a list": lambda x: x.tolist(),
    "where something is": lambda x: x.nonzero(),
    "a mask as index": lambda x: x[x > 0],
    "different values": lambda x: x.unique(),
    "repeats that the device counts": lambda x: x.repeat_interleave(x.long()),
    "a length that the device counts": lambda x: TokenSet.from_mask(x.view(2, 4) > 0),
    "noise": torch.rand_like,
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout in attention": lambda x: F.scaled_dot_product_attention(
        *[x.view(1, 1, 1, 8).bfloat16()] * 3, dropout_p=0.5
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_graph_cannot_hold_is_found(fault: str) -> None:
    with FakeTensorMode(), pytest.raises(REFUSED):
        x = torch.empty(8, device="cuda")
        with DeviceBound("cuda"):
            FAULTS[fault](x)


def test_lengths_that_the_host_knows_are_no_fault() -> None:
    with FakeTensorMode():
        mask_BN = torch.empty((2, 8), dtype=torch.bool, device="cuda")
        with DeviceBound("cuda"):
            TokenSet.from_mask(mask_BN, [3, 3])


def test_a_copied_constant_in_the_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tubelets, "has_exact_matmul", lambda device: True)
    monkeypatch.setattr(tubelets, "made_on", lambda device, values: torch.tensor(values, device=device))
    with pytest.raises(AssertionError, match="host's numbers"):
        follow(recipe("demo"))


@pytest.mark.parametrize("attention_too", [True, False])
def test_recomputation_that_keeps_a_generators_state_is_found(
    monkeypatch: pytest.MonkeyPatch, *, attention_too: bool
) -> None:
    ours = transformer.checkpoint
    monkeypatch.setattr(
        transformer, "checkpoint", lambda *args, **kwargs: ours(*args, **{**kwargs, "preserve_rng_state": True})
    )
    model = {"activation_checkpointing": True, "recompute_attention": attention_too}
    with pytest.raises(AssertionError, match="state of a generator"):
        follow(recipe("demo", model=model))
