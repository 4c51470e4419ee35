"""Compiled and recomputed blocks: bitwise identical results, saved tensors, and operators that run twice."""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from everest_ds.config import Config, FinetuneConfig, FinetuneDataConfig, ModelConfig
from everest_ds.errors import UserError
from everest_ds.model import transformer as compilation
from everest_ds.model.packing import Packing
from everest_ds.model.transformer import ATTENTION_OPERATORS, EncoderOptions, branch_scales, make_blocks, run_blocks
from everest_ds.planning.planner import plan_settings
from everest_ds.recipes import get_recipe
from everest_ds.train.engine import check_compilation, load_systems, shipped_systems
from everest_ds.train.tasks import make_task
from tests.conftest import REPOSITORY

DEPTH = 3
ATTENTION_ON_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"
HALVES: dict[str, dict[str, bool]] = {
    "nothing": {},
    "all but attention": {"activation_checkpointing": True, "recompute_attention": False},
    "all": {"activation_checkpointing": True},
}


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that run; results that selective checkpointing reuses are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def run_backward(
    lengths: tuple[int, ...], *, recomputed: str, dtype: torch.dtype, drops: bool
) -> tuple[list[torch.Tensor], Counter[str]]:
    """Return output and gradients of a stack, and how often each operator ran in forward and backward."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    options = EncoderOptions(attention="sdpa", **HALVES[recomputed])
    blocks = make_blocks(32, DEPTH, 2, options).to(dtype)
    x_MD = torch.randn(sum(lengths), 32, generator=generator).to(dtype).requires_grad_()
    packing = Packing.from_lengths(lengths, x_MD.device)
    scale_LM = None
    if drops:
        noise_BL = torch.rand(len(lengths), 2 * DEPTH, generator=generator)
        scale_LM = branch_scales(noise_BL, 0.5).to(dtype).T[:, packing.clip_of_token()]
    with OperatorCounter() as counter:
        out_MD = run_blocks(blocks, x_MD, packing, options, scale_LM)
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
    calls = DEPTH * len(set(lengths) - {0})  # one SDPA call per clip length
    ran = {recomputed: counts[ATTENTION_ON_CPU] for recomputed, (_, counts) in found.items()}
    assert ran == {"nothing": calls, "all but attention": calls, "all": 2 * calls}
    products = {recomputed: counts["aten::addmm"] for recomputed, (_, counts) in found.items()}
    assert products["all but attention"] == products["all"] > plain["aten::addmm"]


def test_attentions_operators_are_known_to_torch() -> None:
    """With a name that torch does not know, checkpointing would silently save nothing."""
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
    counts = {make_task(small(get_recipe(recipe), **options)).clip_flops() for options in HALVES.values()}
    assert len(counts) == 1
    assert min(counts) > 0


def test_keeping_attention_where_nothing_is_recomputed_is_refused() -> None:
    with pytest.raises(UserError, match=r"recompute_attention=False has no effect with .*checkpointing=False"):
        ModelConfig(recompute_attention=False)
    ModelConfig(activation_checkpointing=True, recompute_attention=False)


# Output and gradients of three blocks, inductor on a CPU against eager, float32, relative to the largest value;
# measured 1.1e-6.
INDUCTOR_RTOL = 1e-5
EQUAL = ((5, 5, 5), (9, 9, 9), (30, 30, 30), (7, 7, 7))
UNEQUAL = ((7, 3, 4), (2, 5), (1, 30, 0, 8), (6, 6, 7))

needs_compiler = pytest.mark.skipif(
    compilation.compile_obstacle("cpu") is not None, reason=f"inductor: {compilation.compile_obstacle('cpu')}"
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Clear torch's compilation caches before and after a test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """A backend that runs each graph eagerly and counts the graphs."""
    counter = CompileCounter()
    monkeypatch.setattr(compilation, "COMPILE_BACKEND", counter)
    return counter


def run_compiled(
    lengths: tuple[int, ...],
    *,
    compiles: bool,
    recomputed: str = "nothing",
    drops: bool = False,
    dtype: torch.dtype = torch.float32,
    autocasts: bool = False,
) -> list[torch.Tensor]:
    """Return output and gradients of a stack."""
    torch.manual_seed(0)
    options = EncoderOptions(compile_blocks=compiles, **HALVES[recomputed])
    blocks = make_blocks(32, DEPTH, 2, options).to(dtype)
    x_MD = torch.randn(sum(lengths), 32).to(dtype).requires_grad_()
    packing = Packing.from_lengths(lengths, x_MD.device)
    scale_LM = None
    if drops:
        scale_BL = branch_scales(torch.rand(len(lengths), 2 * DEPTH), 0.5)
        scale_LM = scale_BL.to(dtype).T[:, packing.clip_of_token()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts, cache_enabled=False):
        out_MD = run_blocks(blocks, x_MD, packing, options, scale_LM)
    out_MD.float().square().mean().backward()
    return [out_MD.detach(), *(t.grad for t in (x_MD, *blocks.parameters()) if t.grad is not None)]


@pytest.mark.parametrize("lengths", [EQUAL, UNEQUAL], ids=["equal lengths", "unequal lengths"])
@pytest.mark.parametrize("drops", [False, True], ids=["whole", "drop path"])
def test_each_half_of_a_block_is_compiled_once_for_all_numbers_of_tokens(
    lengths: tuple[tuple[int, ...], ...], drops: bool, counter: CompileCounter
) -> None:
    """Results are bitwise identical to blocks that are not compiled, because the graphs run eagerly."""
    for of_clips in lengths:
        ours = run_compiled(of_clips, compiles=True, drops=drops)
        theirs = run_compiled(of_clips, compiles=False, drops=drops)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("recomputed", "dtype", "lengths"),
    [("all but attention", torch.float32, UNEQUAL[0]), ("all", torch.bfloat16, EQUAL[0])],
    ids=["all but attention, float32", "all, bf16"],
)
def test_compiled_blocks_can_be_computed_again(
    recomputed: str, dtype: torch.dtype, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like inductor, aot_eager makes separate functions of forward and backward, but needs no C++ compiler."""
    monkeypatch.setattr(compilation, "COMPILE_BACKEND", "aot_eager")
    for drops in (False, True):
        ours = run_compiled(lengths, compiles=True, recomputed=recomputed, drops=drops, dtype=dtype)
        theirs = run_compiled(lengths, compiles=True, drops=drops, dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_compiled_blocks_take_part_in_autocast(counter: CompileCounter) -> None:
    """Blocks are compiled once per autocast state; results are bitwise identical to uncompiled blocks."""
    for drops, autocasts in itertools.product((False, True), (False, True)):
        ours, theirs = (
            run_compiled(EQUAL[0], compiles=compiles, drops=drops, autocasts=autocasts)
            for compiles in (True, False)
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert {tensor.dtype for tensor in ours} == {torch.float32}
    lowered, whole = (run_compiled(EQUAL[0], compiles=True, autocasts=on) for on in (True, False))
    assert not torch.equal(lowered[0], whole[0])


@pytest.mark.slow  # it compiles C++ for half a minute; the tests above run the same graphs
@needs_compiler
def test_inductor_computes_what_eager_does() -> None:
    worst = 0.0
    for lengths in (EQUAL[0], UNEQUAL[0], UNEQUAL[1]):
        ours = run_compiled(lengths, compiles=True, recomputed="all but attention")
        theirs = run_compiled(lengths, compiles=False)
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
    assert counter.frame_count == 0  # operations are counted without compiling
    clips = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    if isinstance(config, FinetuneConfig):
        fast(clips, torch.tensor([0, 1]), torch.rand(2, fast.model.num_noise(config.grid)))
    else:
        fast(clips, torch.rand(2, config.num_selected))
    assert counter.frame_count == (2 if recipe == "demo_ft" else 4)  # two halves in the encoder, two in the decoder
    assert list(fast.state_dict()) == list(plain.state_dict())


def test_stage_3_is_refused_and_the_others_are_not(counter: CompileCounter) -> None:
    config = small(get_recipe("demo"), compile_blocks=True)
    for stage in range(4):
        systems = load_systems(REPOSITORY / "ds_configs" / f"zero{stage}.json")
        if stage < 3:
            check_compilation(config, systems, "cpu")
            continue
        with pytest.raises(UserError, match=r"compile_blocks=True is not available at ZeRO-3: .*; use ZeRO-0"):
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
        (remove_compiler, "cpu", "it needs a compiler, and g[+][+] is not on this machine"),
        (name_missing_compiler, "cpu", "it needs a compiler, and no-such-compiler is not on this machine"),
        (remove_headers, "cpu", "it needs Python's headers, and .*Python.h does not exist"),
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
    with pytest.raises(UserError, match=f"model.compile_blocks=True is not available: {message}.*, or use"):
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
