"""Clocks, the ceiling of matmuls, and shares of a profile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn import functional as F

from everest_ds.benchmark import timing
from everest_ds.benchmark.timing import (
    PARTS,
    Marks,
    Part,
    classify,
    profiled_shares,
    step_times,
    time_shares,
    work_seconds,
)

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 20, 100])
def test_p90_is_the_smallest_that_nine_tenths_do_not_exceed(count: int) -> None:
    values = [float((7 * i) % count) for i in range(count)]
    allowed = [v for v in values if sum(w <= v for w in values) >= 0.9 * count]
    assert step_times(values)["step_ms_p90"] == 1e3 * min(allowed)


def test_step_times_are_median_and_ninetieth() -> None:
    assert step_times([0.003, 0.001, 0.002]) == {"step_ms_median": 2.0, "step_ms_p90": 3.0}


def test_rate_of_a_product_is_its_operations_over_its_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Marks, "seconds", lambda self: [1.0, 0.5, 0.25])
    assert timing.matmul_tflops(CPU, torch.float32, 50, rounds=3) == 2 * 50**3 / 0.5 / 1e12
    assert timing.measure_ceiling(CPU) is None


def test_products_are_really_taken() -> None:
    assert 0 < timing.matmul_tflops(CPU, torch.float32, 64, rounds=3) < 1e3


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

    def step() -> None:
        x = (torch.randn(8, 64) @ weight).view(1, 2, 8, 32)
        F.gelu(F.scaled_dot_product_attention(x, x, x)).sum().backward()
        with torch.profiler.record_function(timing.OPTIMISER_REGION):
            optimiser.step()

    found = profiled_shares(CPU, step)
    assert found is not None
    assert list(found) == list(PARTS)
    assert sum(found.values()) == pytest.approx(1, abs=3e-4)  # five shares of four digits
    assert all(found[part] > 0 for part in ("attention", "linear", "other", "optimiser"))
    assert found["communication"] == 0
