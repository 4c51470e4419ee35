"""Blocks that are computed again in backward: what is kept, what runs twice, and that no number changes."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from everest_ds.config import Config, FinetuneConfig, FinetuneDataConfig, ModelConfig
from everest_ds.errors import UserError
from everest_ds.model.packing import Packing
from everest_ds.model.transformer import ATTENTION_OPERATORS, branch_scales, make_blocks, run_blocks
from everest_ds.recipes import get_recipe
from everest_ds.train.tasks import make_task

DEPTH = 3
ATTENTION_ON_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"
HALVES = {"nothing": (False, True), "all but attention": (True, False), "all": (True, True)}


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that really run; what selective checkpointing hands out again does not come here."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def run_backward(
    lengths: tuple[int, ...], *, recomputed: str, dtype: torch.dtype, drops: bool
) -> tuple[list[torch.Tensor], Counter[str]]:
    """Output and gradients of a stack, and how often each operator ran in forward and backward."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    blocks = make_blocks(width=32, depth=DEPTH, num_heads=2, backend="sdpa").to(dtype)
    x_MD = torch.randn(sum(lengths), 32, generator=generator).to(dtype).requires_grad_()
    packing = Packing.from_lengths(lengths, x_MD.device)
    scale_LM = None
    if drops:
        noise_BL = torch.rand(len(lengths), 2 * DEPTH, generator=generator)
        scale_LM = branch_scales(noise_BL, 0.5).to(dtype).T[:, packing.clip_of_token()]
    checkpointing, recompute_attention = HALVES[recomputed]
    with OperatorCounter() as counter:
        out_MD = run_blocks(
            blocks,
            x_MD,
            packing,
            checkpointing=checkpointing,
            recompute_attention=recompute_attention,
            scale_LM=scale_LM,
        )
        out_MD.float().square().mean().backward()
    gradients = [tensor.grad for tensor in (x_MD, *blocks.parameters()) if tensor.grad is not None]
    assert len(gradients) == 1 + len(list(blocks.parameters()))
    return [out_MD.detach(), *gradients], counter.counts


@pytest.mark.parametrize("lengths", [(5, 5, 5), (7, 3, 7, 0, 1)], ids=["equal lengths", "unequal lengths"])
@pytest.mark.parametrize("drops", [False, True], ids=["whole", "drop path"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_recomputing_changes_no_bit_and_attention_runs_once_where_it_is_kept(
    lengths: tuple[int, ...], drops: bool, dtype: torch.dtype
) -> None:
    found = {
        recomputed: run_backward(lengths, recomputed=recomputed, dtype=dtype, drops=drops) for recomputed in HALVES
    }
    expected, plain = found["nothing"]
    for tensors, _ in found.values():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, expected, strict=True))
    calls = DEPTH * len(set(lengths) - {0})  # SDPA attends to the clips of one length at once
    ran = {recomputed: counts[ATTENTION_ON_CPU] for recomputed, (_, counts) in found.items()}
    assert ran == {"nothing": calls, "all but attention": calls, "all": 2 * calls}
    products = {recomputed: counts["aten::addmm"] for recomputed, (_, counts) in found.items()}
    assert products["all but attention"] == products["all"] > plain["aten::addmm"]


def test_attentions_operators_are_known_to_torch() -> None:
    """A name that torch has no operator of would keep nothing, and nobody would notice."""
    importlib.import_module("torch.nn.attention.varlen")  # registers its operator
    known = set(torch._C._dispatch_get_all_op_names())
    assert {name for name in ATTENTION_OPERATORS if not name.startswith("flash_attn::")} <= known


def small(config: Config, **model: Any) -> Config:
    data = {"image_size": 32, "num_frames": 4}
    if isinstance(config, FinetuneConfig):
        return replace(config, data=FinetuneDataConfig(num_classes=3, **data), model=replace(config.model, **model))
    return replace(config, data=replace(config.data, **data), model=replace(config.model, **model))


@pytest.mark.parametrize("recipe", ["demo", "demo_ft"])
def test_operations_of_a_clip_are_the_same_however_much_is_recomputed(recipe: str) -> None:
    counts = {
        make_task(small(get_recipe(recipe), activation_checkpointing=on, recompute_attention=too)).clip_flops()
        for on, too in HALVES.values()
    }
    assert len(counts) == 1
    assert min(counts) > 0


def test_keeping_attention_where_nothing_is_recomputed_is_refused() -> None:
    with pytest.raises(UserError, match=r"recompute_attention=False has no effect with .*checkpointing=False"):
        ModelConfig(recompute_attention=False)
    ModelConfig(activation_checkpointing=True, recompute_attention=False)
