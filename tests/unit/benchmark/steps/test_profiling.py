"""Profiles of a step: shares of time, calls per phase, kernel launches, and the longest kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn import functional as F

from everest_ds.benchmark.steps import profiling
from everest_ds.benchmark.steps.profiling import (
    OPTIMISER_REGION,
    PARTS,
    PROFILED_STEPS,
    Part,
    classify,
    count_by_phase,
    longest_kernels,
    profile_step,
    time_shares,
)

CPU = torch.device("cpu")


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
    """Kernels without an operator are listed under their own names; regions are not counted as kernels."""
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


def test_profile_of_real_steps_finds_each_part_and_counts_the_calls_of_one() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    optimiser = torch.optim.AdamW([weight])

    def step() -> None:
        x = (torch.randn(8, 64) @ weight).view(1, 2, 8, 32)
        loss = F.gelu(F.scaled_dot_product_attention(x, x, x)).sum()
        loss.backward()
        with torch.profiler.record_function(OPTIMISER_REGION):
            optimiser.step()

    found = profile_step(CPU, step, num_kernels=3)
    assert found.shares is not None
    assert list(found.shares) == list(PARTS)
    assert sum(found.shares.values()) == pytest.approx(1, abs=3e-4)  # five shares, rounded to four digits
    assert all(found.shares[part] > 0 for part in ("attention", "linear", "other", "optimiser"))
    assert found.shares["communication"] == 0
    assert found.kernel_launches is None
    assert all(calls > 5 for calls in found.aten_calls.values())
    times = [row["ms"] for row in found.kernels]
    assert len(times) == 3
    assert times == sorted(times, reverse=True)


def test_calls_are_counted_with_the_nested_ones() -> None:
    """An addition is one call, `relu` two: it calls `clamp_min`."""
    x = torch.ones(3)
    calls = [profile_step(CPU, step).aten_calls for step in (lambda: x + x, lambda: (x + x).relu())]
    assert calls == [{"forward": 1, "backward": 0, "update": 0}, {"forward": 3, "backward": 0, "update": 0}]


def host_event(name: str, start: float, end: float, parent: Any = None) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type=DeviceType.CPU, time_range=span, cpu_parent=parent)


def test_calls_and_launches_belong_to_the_phase_in_which_they_begin() -> None:
    """Events are out of order, as in a GPU's profile; kernels on the device do not count as launches."""
    events = []
    for start in (0.0, 100.0)[:PROFILED_STEPS]:
        inner = host_event("cudaLaunchKernel", start + 2, start + 4)
        events += [
            host_event(OPTIMISER_REGION, start + 50, start + 70),
            host_event("aten::_fused_adamw_", start + 51, start + 60),
            host_event("cudaLaunchKernelExC", start + 52, start + 53),
            host_event("aten::mm", start, start + 5),
            inner,
            host_event("cuLaunchKernelEx", start + 3, start + 4, parent=inner),  # the same launch in the driver
            host_event("cudaGraphLaunch", start + 6, start + 7),
            host_event("cudaStreamIsCapturing", start + 6, start + 7),
            host_event("autograd::engine::evaluate_function: MmBackward0", start + 10, start + 30),
            host_event("aten::mm", start + 11, start + 20),
            host_event("cuLaunchKernel", start + 12, start + 13),
            host_event("cudaMemsetAsync", start + 14, start + 15),
            host_event("aten::_foreach_copy_", start + 40, start + 45),  # between the engine's work and the update
            host_event("cudaMemcpyAsync", start + 41, start + 42),
            host_event("aten::add_", start + 71, start + 72),  # after the update: the next step's
            kernel("cudaLaunchKernel", 5.0),
        ]
    calls = count_by_phase(events, lambda event: event.name.startswith("aten::"))
    assert calls == {"forward": 2, "backward": 2, "update": 1}
    assert count_by_phase(events, profiling._is_launch) == {"forward": 2, "backward": 3, "update": 1}


@pytest.mark.parametrize(
    ("name", "counts"),
    {
        "cudaLaunchKernel": True, "cudaLaunchCooperativeKernel": True, "cudaMemcpy2DAsync": True,
        "hipExtModuleLaunchKernel": True, "hipMemcpyWithStream": True, "hipGraphLaunch": True,
        "cudaDeviceSynchronize": False, "cudaEventRecord": False, "cudaFuncGetAttributes": False,
        "cudaGraphInstantiate": False, "aten::copy_": False, "cublasLtMatmul": False, "Memcpy DtoD": False,
    }.items(),
)  # fmt: skip
def test_launches_are_known_by_the_names_of_runtime_and_driver(name: str, counts: bool) -> None:
    assert profiling._is_launch(host_event(name, 0, 1)) is counts


def test_longest_kernels_are_listed_by_their_time_in_a_step() -> None:
    gemm = kernel("gemm", 3000.0)
    events = [gemm, kernel("gelu", 500.0), gemm, operator("aten::mm", 9000.0)]
    events.append(kernel(OPTIMISER_REGION, 9000.0, annotation=True))
    assert longest_kernels(events, "cuda", 1) == [{"name": "gemm", "ms": 3.0, "share": 0.9231, "times": 1.0}]
    by_cpu = longest_kernels([operator("aten::mm", 4000.0), operator("aten::mul", 1.0), events[0]], "cpu", 5)
    assert [row["name"] for row in by_cpu] == ["aten::mm", "aten::mul"]
    assert by_cpu[0]["ms"] == 2.0
