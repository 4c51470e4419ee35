"""Measuring steps: clips, clocks, the ceiling, shares of a profile, and lines of real steps on a CPU."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn import functional as F

from everest_ds import cli
from everest_ds.benchmark import profile as ceiling
from everest_ds.benchmark import profile as shares
from everest_ds.benchmark import workbench as measuring
from everest_ds.benchmark.profile import PARTS, Part, classify, time_shares
from everest_ds.benchmark.timing import Marks, milliseconds, ninetieth, work_seconds
from everest_ds.benchmark.workbench import moving_clips, powers_of_two, synthetic_batch
from everest_ds.recipes import find_config
from everest_ds.train.tasks import make_task

CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_clips_move_in_a_part_and_stand_still_in_another() -> None:
    clips_BCTHW = moving_clips(3, 6, 32, seeded(0))
    assert clips_BCTHW.shape == (3, 3, 6, 32, 32)
    assert clips_BCTHW.dtype == torch.uint8
    for first, second in itertools.pairwise(clips_BCTHW.unbind(2)):
        changed = (first != second).any(dim=1)
        assert changed.any(dim=(1, 2)).all()
        assert (~changed).float().mean() > 0.2
    assert torch.equal(clips_BCTHW, moving_clips(3, 6, 32, seeded(0)))
    assert not torch.equal(clips_BCTHW, moving_clips(3, 6, 32, seeded(1)))
    assert not torch.equal(clips_BCTHW[0], clips_BCTHW[1])


@pytest.mark.parametrize("recipe", ["demo", "demo_ft", "frames", "mixed"])
def test_synthetic_batch_is_what_the_task_takes(recipe: str) -> None:
    """A loss comes out of it, for every kind of input a task has."""
    config: Any = find_config("demo" if recipe == "frames" else "demo_ft" if recipe == "mixed" else recipe)
    if recipe == "frames":
        config = replace(config, selection=replace(config.selection, alpha=1.5))
    if config.task == "finetune":
        config = replace(config, data=replace(config.data, num_classes=5))
    if recipe == "mixed":
        config = replace(config, data=replace(config.data, mixup_alpha=0.8))
    task = make_task(config)
    batch = synthetic_batch(task, config, 2, CPU, 0)
    assert (batch.target_BK is not None) == (recipe == "mixed")
    assert batch.clips_BCTHW.shape[2] == (24 if recipe == "frames" else 16)
    assert task(*task.inputs(batch, CPU)).isfinite()
    again = synthetic_batch(task, config, 2, CPU, 0)
    assert torch.equal(batch.clips_BCTHW, again.clips_BCTHW)
    assert torch.equal(batch.noise_BS, again.noise_BS)


def test_marks_are_the_times_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr("everest_ds.benchmark.timing.time.perf_counter", lambda: next(times))
    marks = Marks(CPU)
    for _ in range(3):
        marks.mark()
    assert marks.seconds() == [0.5, 1.5]


def test_work_on_a_cpu_is_timed_by_what_it_took_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everest_ds.benchmark.timing.time.process_time", lambda: 42.0)
    assert work_seconds(CPU) == 42.0


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 20])
def test_ninetieth_is_the_smallest_that_nine_tenths_do_not_exceed(count: int) -> None:
    values = [float((7 * i) % count) for i in range(count)]
    allowed = [v for v in values if sum(w <= v for w in values) >= 0.9 * count]
    assert ninetieth(values) == min(allowed)


def test_milliseconds_are_median_and_ninetieth() -> None:
    assert milliseconds([0.003, 0.001, 0.002]) == {"step_ms_median": 2.0, "step_ms_p90": 3.0}


def test_rate_of_a_product_is_its_operations_over_its_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling.Marks, "seconds", lambda self: [1.0, 0.5, 0.25])
    assert ceiling.matmul_tflops(CPU, torch.float32, 50, rounds=3) == 2 * 50**3 / 0.5 / 1e12
    assert ceiling.measure_ceiling(CPU) is None


def test_products_are_really_taken() -> None:
    assert 0 < ceiling.matmul_tflops(CPU, torch.float32, 64, rounds=3) < 1e3


NAMES: dict[str, Part] = {
    "aten::addmm": "linear",
    "aten::mm": "linear",
    "aten::convolution_backward": "linear",
    "aten::mkldnn_convolution": "linear",
    "nvjet_hsh_256x128_64x4_1x2_h_bz_coopB_TNT": "linear",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": "linear",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "linear",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "torch_attn::_varlen_attn": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128>>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
    "everest.optimiser": "optimiser",
    "aten::_fused_adamw_": "optimiser",
    "c10d::allreduce_": "communication",
    "gloo:all_reduce": "communication",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096>)": "communication",
    "nccl:_reduce_scatter_base": "communication",
    "record_param_comms": "communication",
    "aten::gelu": "other",
    "aten::native_layer_norm": "other",
    "aten::copy_": "other",
    "aten::index_put_": "other",
    "void at::native::vectorized_elementwise_kernel<4>": "other",
    "Memcpy DtoD (Device -> Device)": "other",
}


@pytest.mark.parametrize(("name", "part"), NAMES.items())
def test_operators_and_kernels_are_known_by_name(name: str, part: Part) -> None:
    assert classify([name]) == part


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["aten::copy_", "aten::addmm", "aten::linear"], "linear"),
        (["aten::bmm", "aten::_scaled_dot_product_attention_math"], "attention"),
        (["aten::mul_", "Optimizer.step#AdamW.step", "everest.optimiser"], "optimiser"),
        (["c10d::allgather_", "everest.optimiser"], "communication"),
        (["void at::native::elementwise_kernel", "aten::add_", "AddBackward0"], "other"),
    ],
)
def test_what_an_operator_calls_belongs_to_it(names: list[str], part: Part) -> None:
    assert classify(names) == part
    assert classify(reversed(names)) == part


def operator(name: str, micros: float, parent: Any = None, kernels: Any = ()) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, device_type=DeviceType.CPU, self_cpu_time_total=micros, cpu_parent=parent, kernels=list(kernels)
    )


def kernel(name: str, micros: float, *, annotation: bool = False) -> SimpleNamespace:
    span = SimpleNamespace(elapsed_us=lambda: micros)
    return SimpleNamespace(
        name=name, device_type=DeviceType.CUDA, time_range=span, is_user_annotation=annotation, duration=micros
    )


def test_kernels_count_once_and_belong_to_who_launched_them() -> None:
    """Those that no operator launched go by their own name; regions are no kernels."""
    in_step = kernel("elementwise", 5.0)
    product, orphan = kernel("mystery", 20.0), kernel("triton_poi_fused_gelu", 10.0)
    region = operator("everest.optimiser", 99.0)
    events = [
        region,
        operator("aten::mul_", 99.0, region, [in_step]),
        operator("aten::mm", 99.0, None, [product]),
        in_step, product, orphan, kernel("everest.optimiser", 50.0, annotation=True), kernel("flash_fwd", 5.0),
    ]  # fmt: skip
    expected = {"attention": 5, "linear": 20, "other": 10, "optimiser": 5, "communication": 0}
    assert time_shares(events, "cuda") == pytest.approx({part: time / 40 for part, time in expected.items()})
    assert time_shares([region], "cuda") is None


def test_shares_of_a_real_profile_sum_to_one_and_find_each_part() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    optimiser = torch.optim.AdamW([weight])
    with torch.profiler.profile(activities=shares.profile_activities(CPU)) as profile:
        x = (torch.randn(8, 64) @ weight).view(1, 2, 8, 32)
        F.gelu(F.scaled_dot_product_attention(x, x, x)).sum().backward()
        with torch.profiler.record_function(shares.OPTIMISER_REGION):
            optimiser.step()
    found = time_shares(list(profile.events() or ()), "cpu")
    assert found is not None
    assert list(found) == list(PARTS)
    assert math.isclose(sum(found.values()), 1, rel_tol=1e-9)
    assert all(found[part] > 0 for part in ("attention", "linear", "other", "optimiser"))
    assert found["communication"] == 0


def test_sweep_doubles() -> None:
    assert list(itertools.islice(powers_of_two(8), 5)) == [8, 16, 32, 64, 128]


def test_sweep_ends_where_memory_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine is made up; the sizes, the lines and the end of the sweep are not."""

    def measure(bench: Any, size: int, **options: Any) -> dict[str, Any]:
        if size > 2:
            raise torch.OutOfMemoryError("no more")
        sizes = {"peak_allocated_gib": 1.0 + size, "peak_reserved_gib": 9.0}
        return {"clips_per_s": 3.0, "tokens_per_s": 30.0, "step_ms_median": 1.0, "step_ms_p90": 2.0, **sizes} | {
            "mfu": 0.5, "mfu_data_sheet": None, "shares": None,
        }  # fmt: skip

    bench = SimpleNamespace(device=CPU, describe=lambda: {"zero_stage": 2})
    monkeypatch.setattr(measuring, "build_workbench", lambda *given, **named: bench)
    monkeypatch.setattr(measuring, "measure_steps", measure)
    words = ["benchmark", "step", "demo", "--micro-batch", "1", "2", "4", "8"]
    assert cli.main([*words, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["micro_batch"], line["out_of_memory"]) for line in lines] == [(1, False), (2, False), (4, True)]
    assert "clips_per_s" not in lines[2]
    assert lines[0]["added_mb_per_clip"] is None
    assert lines[1]["added_mb_per_clip"] == pytest.approx(2**30 / 1e6, abs=1e-3)
    assert cli.main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].strip() == "4  out of memory"
    assert "50.0%" in shown[-2]


def test_throughput_is_that_of_the_slowest_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of a made-up launch: steps last as long as the slower, memory is the larger, tokens add up."""
    bench = SimpleNamespace(
        device=CPU, config=SimpleNamespace(run=SimpleNamespace(seed=0)), world=SimpleNamespace(rank=0, size=2),
        task=SimpleNamespace(inputs=lambda batch, device: (), visible_tokens=10, clip_flops=lambda: 2e12),
    )  # fmt: skip
    monkeypatch.setattr(measuring, "synthetic_batch", lambda *given: None)
    monkeypatch.setattr(measuring, "take_step", lambda bench, inputs: None)
    monkeypatch.setattr(measuring, "profiled_shares", lambda bench, step: None)
    mine, other = ([0.1, 0.4], 20, 1.0, None), ([0.3, 0.2], 22, 2.0, None)
    monkeypatch.setattr(measuring.distributed, "gather_objects", lambda own: [mine, other])
    found = measuring.measure_steps(bench, 3, steps=2, warmup=0, ceiling_tflops=100.0)
    assert found["clips_per_s"] == pytest.approx(3 * 2 * 2 / 0.7, abs=1e-4)
    assert found["tokens_per_s"] == pytest.approx(42 / 0.7, abs=0.1)
    assert found["step_ms_median"] == pytest.approx(statistics.median([300, 400]))
    assert found["peak_allocated_gib"] == 2.0
    assert found["mfu"] == pytest.approx(found["clips_per_s"] / 2 * 2 / 100, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("demo --micro-batch 0", "--micro-batch 0 must be auto, or numbers of clips of at least 1"),
        ("demo --micro-batch 4 many", "--micro-batch 4 many must be auto"),
        ("demo --micro-batch auto", "there is none; name sizes: --micro-batch 1 2 4"),
        ("demo --memory-gib 8", "limits a GPU's memory, and there is none"),
        ("demo --memory-gib nan", "--memory-gib nan must be a number of GiB above 0"),
        ("demo --steps 0", "--steps 0 must be at least 1"),
        ("demo --warmup -1", "--warmup -1 must be at least 0"),
        ("demo --gpus 2", "--gpus 2 belongs to --sweep-stages"),
        ("demo --out x.json", "--out x.json belongs to --sweep-stages"),
        ("demo --sweep-stages --gpus 0", "--gpus 0 must be at least 1"),
        ("demo --sweep-stages --stages zero4", "--stages zero4: there is no such file in ds_configs"),
        ("demo --sweep-stages --compare everest", "--compare and --sweep-stages are measurements of their own"),
        ("demo --sweep-ratio 0.2 0.3 --sweep-frames 8 16", "--sweep-ratio and --sweep-frames are measurements"),
        ("demo --sweep-ratio 0.2 0.3", "--sweep-ratio 0.2 0.3 must name at least 3 different values"),
        ("demo --sweep-frames 8 16 8", "--sweep-frames 8 16 8 must name at least 3 different values"),
        ("demo --sweep-ratio 0.5 1.0 1.5", "selection.selected_ratio=1.5"),
        ("demo --sweep-frames 8 15 16", "num_frames=15 is not a positive multiple"),
        ("demo --sweep-ratio 0.2 0.3 0.4 --micro-batch 1 2", "all points of a sweep have one micro-batch"),
        ("demo --sweep-stages --ds-config ds_configs/zero1.json", "takes no DeepSpeed file"),
        ("demo --ds-config absent.json", "absent.json"),
        ("demo_ft --compare everest", "demo_ft is a fine-tuning"),
        ("demo --compare everest", "16 frames of 224 pixels in tubelets of 2 x 16 x 16"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_way_out(
    words: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["benchmark", "step", *words.split()]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_modes_without_a_launcher_refuse_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["benchmark", "step", "demo", "--sweep-stages"]) == 2
    assert "--sweep-stages is started without a launcher, got 2 processes" in capsys.readouterr().err
    assert cli.main(["benchmark", "step", "demo", "--sweep-frames", "8", "16", "24"]) == 2
    assert "--sweep-frames is started without a launcher, got 2 processes" in capsys.readouterr().err
