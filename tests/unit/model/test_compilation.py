"""Compiled blocks: the same numbers, one compilation for all lengths, the same names, and refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from everest_ds.config import FinetuneConfig
from everest_ds.errors import UserError
from everest_ds.model import transformer as compilation
from everest_ds.model.packing import Packing
from everest_ds.model.transformer import branch_scales, make_blocks, run_blocks
from everest_ds.planning.planner import plan_settings
from everest_ds.recipes import get_recipe
from everest_ds.train.engine import check_compilation, load_systems, shipped_systems
from everest_ds.train.tasks import make_task
from tests.conftest import REPOSITORY
from tests.unit.model.test_recomputation import HALVES, small

# Output and gradients of three blocks by inductor on a CPU against eager, float32, of the largest: measured 1.1e-6.
INDUCTOR_RTOL = 1e-5
DEPTH = 3
EQUAL = ((5, 5, 5), (9, 9, 9), (30, 30, 30), (7, 7, 7))
UNEQUAL = ((7, 3, 4), (2, 5), (1, 30, 0, 8), (6, 6, 7))

needs_compiler = pytest.mark.skipif(
    compilation.compile_obstacle("cpu") is not None, reason=f"inductor: {compilation.compile_obstacle('cpu')}"
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What another test had compiled does not count here, nor does torch remember it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """A backend that runs each graph as it is and counts how many it was given."""
    counter = CompileCounter()
    monkeypatch.setattr(compilation, "COMPILE_BACKEND", counter)
    return counter


def run_backward(
    lengths: tuple[int, ...],
    *,
    compiles: bool,
    recomputed: str = "nothing",
    drops: bool = False,
    dtype: torch.dtype = torch.float32,
    autocasts: bool = False,
) -> list[torch.Tensor]:
    """Output and gradients of a stack."""
    torch.manual_seed(0)
    blocks = make_blocks(width=32, depth=DEPTH, num_heads=2, backend="auto", compiles=compiles).to(dtype)
    x_MD = torch.randn(sum(lengths), 32).to(dtype).requires_grad_()
    packing = Packing.from_lengths(lengths, x_MD.device)
    scale_LM = None
    if drops:
        scale_BL = branch_scales(torch.rand(len(lengths), 2 * DEPTH), 0.5)
        scale_LM = scale_BL.to(dtype).T[:, packing.clip_of_token()]
    checkpointing, recompute_attention = HALVES[recomputed]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts, cache_enabled=False):
        out_MD = run_blocks(
            blocks,
            x_MD,
            packing,
            checkpointing=checkpointing,
            recompute_attention=recompute_attention,
            scale_LM=scale_LM,
        )
    out_MD.float().square().mean().backward()
    return [out_MD.detach(), *(t.grad for t in (x_MD, *blocks.parameters()) if t.grad is not None)]


@pytest.mark.parametrize("lengths", [EQUAL, UNEQUAL], ids=["equal lengths", "unequal lengths"])
@pytest.mark.parametrize("drops", [False, True], ids=["whole", "drop path"])
def test_each_half_of_a_block_is_compiled_once_for_all_numbers_of_tokens(
    lengths: tuple[tuple[int, ...], ...], drops: bool, counter: CompileCounter
) -> None:
    """And the graphs compute the same bits, when they are run as they are."""
    for of_clips in lengths:
        ours = run_backward(of_clips, compiles=True, drops=drops)
        theirs = run_backward(of_clips, compiles=False, drops=drops)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counter.frame_count == 2


@pytest.mark.parametrize("recomputed", ["all but attention", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_compiled_blocks_can_be_computed_again(
    recomputed: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aot_eager compiles forward and backward into functions of their own, as inductor does, without a compiler."""
    monkeypatch.setattr(compilation, "COMPILE_BACKEND", "aot_eager")
    for lengths, drops in itertools.product((EQUAL[0], UNEQUAL[0]), (False, True)):
        ours = run_backward(lengths, compiles=True, recomputed=recomputed, drops=drops, dtype=dtype)
        theirs = run_backward(lengths, compiles=True, drops=drops, dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_compiled_blocks_take_part_in_autocast(counter: CompileCounter) -> None:
    """Compiled once with it and once without, and the same bits as blocks that are not compiled."""
    for drops, autocasts in itertools.product((False, True), (False, True)):
        ours, theirs = (
            run_backward(EQUAL[0], compiles=compiles, drops=drops, autocasts=autocasts)
            for compiles in (True, False)
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert {tensor.dtype for tensor in ours} == {torch.float32}
    lowered, whole = (run_backward(EQUAL[0], compiles=True, autocasts=on) for on in (True, False))
    assert not torch.equal(lowered[0], whole[0])


@needs_compiler
def test_inductor_computes_what_eager_does() -> None:
    worst = 0.0
    for lengths in (EQUAL[0], UNEQUAL[0], UNEQUAL[1]):
        ours = run_backward(lengths, compiles=True, recomputed="all but attention")
        theirs = run_backward(lengths, compiles=False)
        for a, b in zip(ours, theirs, strict=True):
            worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    print(f"worst {worst:.1e}")
    assert 0 < worst < INDUCTOR_RTOL


@pytest.mark.parametrize("recipe", ["demo", "demo_ft"])
def test_names_of_weights_and_operations_of_a_clip_stay_the_same(recipe: str, counter: CompileCounter) -> None:
    config = small(get_recipe(recipe))
    plain, fast = (make_task(small(config, compile_blocks=compiles)) for compiles in (False, True))
    assert all(block.compiles for name, block in fast.named_modules() if name.split(".")[-2:-1] == ["blocks"])
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert fast.clip_flops() == plain.clip_flops() > 0
    assert counter.frame_count == 0  # operations are counted uncompiled
    clips = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    if isinstance(config, FinetuneConfig):
        fast(clips, torch.tensor([0, 1]), torch.rand(2, fast.model.num_noise(config.grid)))
    else:
        fast(clips, torch.rand(2, config.num_selected))
    assert counter.frame_count == (2 if recipe == "demo_ft" else 4)  # encoder, and decoder
    assert list(fast.state_dict()) == list(plain.state_dict())


def test_stage_3_is_refused_and_the_others_are_not(counter: CompileCounter) -> None:
    config = small(get_recipe("demo"), compile_blocks=True)
    for stage in range(4):
        systems = load_systems(REPOSITORY / "ds_configs" / f"zero{stage}.json")
        if stage < 3:
            check_compilation(config, systems, "cpu")
            continue
        with pytest.raises(UserError, match=r"model.compile_blocks=True cannot serve at ZeRO-3: .*; use ZeRO-0"):
            check_compilation(config, systems, "cpu")
        check_compilation(small(config, compile_blocks=False), systems, "cpu")


def remove_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(folder))


def name_missing_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")


def remove_headers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(compilation.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda name: str(folder))


def remove_triton(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("break_machine", "device_type", "message"),
    [
        (remove_compiler, "cpu", "it needs a compiler, and there is no g[+][+] on this machine"),
        (name_missing_compiler, "cpu", "it needs a compiler, and there is no no-such-compiler on this machine"),
        (remove_headers, "cpu", "it needs Python's headers, and there is no .*Python.h"),
        (remove_triton, "cuda", "it needs the triton package on a GPU"),
    ],
)
def test_a_machine_that_cannot_compile_is_refused(
    break_machine: Callable[[pytest.MonkeyPatch, Path], None],
    device_type: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_machine(monkeypatch, tmp_path)
    config = small(get_recipe("demo"), compile_blocks=True)
    with pytest.raises(UserError, match=f"model.compile_blocks=True cannot serve: {message}.*, or use"):
        check_compilation(config, {}, device_type)
    check_compilation(small(config, compile_blocks=False), {}, device_type)


def test_plan_compiles_where_it_can_and_says_that_it_does_not_count_it() -> None:
    config = replace(get_recipe("k400_vit_s"))
    config = replace(config, model=replace(config.model, compile_blocks=True))
    settings = plan_settings(config, shipped_systems(), num_gpus=8, memory_bytes=80 * 2**30)
    compiles: dict[str, Any] = {setting.name: setting.config.model.compile_blocks for setting in settings}
    assert compiles == {"zero0": True, "zero1": True, "zero2": True, "zero3": False, "zero3_offload": False}
    for setting in settings:
        assert ("model.compile_blocks" in setting.estimate.not_modelled) == compiles[setting.name]
