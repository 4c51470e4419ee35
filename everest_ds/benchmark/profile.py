"""Where the time of a step goes: a profile's operators and kernels, sorted into five parts by their names.

Place in the flow: `benchmark.workbench` profiles a step or two beside those that it times. On a GPU the
time is that of kernels, each sorted by its own name, by the operator that launched it and by all that called this
one; on a CPU it is what each operator took itself. Kernels that run at the same time count each in full.
"""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch.autograd import DeviceType

from everest_ds.benchmark.timing import Marks

# Edges of the square matrices that are tried on a GPU: large enough to fill one, small beside its memory.
EDGES = (4096, 8192, 16384)
ROUNDS, WARMUP = 20, 5


def matmul_tflops(device: torch.device, dtype: torch.dtype, edge: int, rounds: int = ROUNDS) -> float:
    """Return the rate of one square product, in 10^12 operations a second; two for a multiply-accumulate.

    Args:
        device: Where.
        dtype: Of both factors, which are random: a GPU multiplies zeros faster, because they cost less power.
        edge: Rows and columns.
        rounds: Products of which the median counts.
    """
    generator = torch.Generator(device).manual_seed(0)
    first, second = (torch.randn(edge, edge, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(first)
    for _ in range(WARMUP):
        torch.mm(first, second, out=out)
    marks = Marks(device)
    marks.mark()
    for _ in range(rounds):
        torch.mm(first, second, out=out)
        marks.mark()
    return 2 * edge**3 / statistics.median(marks.seconds()) / 1e12


def measure_ceiling(device: torch.device) -> float | None:
    """Return the best bfloat16 rate of a GPU over some sizes, in TFLOP/s; None for a CPU."""
    if device.type != "cuda":
        return None
    best = max(matmul_tflops(device, torch.bfloat16, edge) for edge in EDGES)
    torch.cuda.empty_cache()
    return best


Part = Literal["attention", "linear", "other", "optimiser", "communication"]
PARTS: tuple[Part, ...] = ("attention", "linear", "other", "optimiser", "communication")
# The name under which the optimiser's step is put into the profile; `classify` knows it.
OPTIMISER_REGION = "everest.optimiser"

# In this order: what is sent during the optimiser's step is communication, and attention's products are attention.
_RULES: tuple[tuple[Part, re.Pattern[str]], ...] = (
    ("communication", re.compile(r"nccl|^gloo:|c10d::|record_param_comms", re.IGNORECASE)),
    ("optimiser", re.compile(rf"{re.escape(OPTIMISER_REGION)}|_fused_adam|FusedAdam")),
    (
        "attention",
        re.compile(r"scaled_dot_product|ScaledDotProduct|flash|fmha|_efficient_attention|varlen_attn|sdpa"),
    ),
    (
        "linear",
        re.compile(
            r"^aten::(mm|addmm|bmm|baddbmm|addmv|mv|linear|matmul|\w*convolution\w*|conv[123]d|mkldnn_linear)$"
            r"|gemm|gemv|nvjet|cublas|cutlass|xmma|implicit_convolve|wgrad|dgrad",
            re.IGNORECASE,
        ),
    ),
)


def classify(names: Iterable[str]) -> Part:
    """Return the part of a step that a piece of time belongs to.

    Args:
        names: Of the kernel, the operator that launched it, and all that called this one, in any order.
    """
    names = list(names)
    for part, pattern in _RULES:
        if any(pattern.search(name) for name in names):
            return part
    return "other"


def time_shares(events: Sequence[Any], device_type: str) -> dict[Part, float] | None:
    """Return the share of each part in the time of a profile; they sum to 1. None where no time was seen.

    Args:
        events: Of ``torch.profiler.profile(...).events()``.
        device_type: cuda counts kernels, cpu what operators took themselves.
    """
    times: Counter[Part] = Counter()
    pieces = _kernel_times(events) if device_type == "cuda" else _operator_times(events)
    for names, microseconds in pieces:
        times[classify(names)] += microseconds  # type: ignore[assignment]
    total = sum(times.values())
    return {part: times[part] / total for part in PARTS} if total else None


def _operator_times(events: Sequence[Any]) -> Iterator[tuple[list[str], float]]:
    for event in events:
        if event.device_type == DeviceType.CPU and event.self_cpu_time_total > 0:
            yield _names_upwards(event), event.self_cpu_time_total


def _kernel_times(events: Sequence[Any]) -> Iterator[tuple[list[str], float]]:
    """Yield kernels with the operators above them, then those that no operator launched (Triton's may be)."""
    seen: Counter[str] = Counter()
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        names = _names_upwards(event)
        for kernel in event.kernels:
            seen[kernel.name] += kernel.duration
            yield [kernel.name, *names], kernel.duration
    for event in events:
        if event.device_type == DeviceType.CPU or event.is_user_annotation:
            continue
        microseconds = event.time_range.elapsed_us()
        known = min(seen[event.name], microseconds)
        seen[event.name] -= known
        if microseconds > known:
            yield [event.name], microseconds - known


def _names_upwards(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def profile_activities(device: torch.device) -> list[torch.profiler.ProfilerActivity]:
    """Return what has to be recorded on a device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    return [*activities, torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else activities
