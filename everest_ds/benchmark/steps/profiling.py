"""Profile of a step: shares of its time, operator calls, kernel launches, the longest kernels."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd import DeviceType

PROFILED_STEPS = 2

Part = Literal["attention", "linear", "other", "optimiser", "communication"]
PARTS: tuple[Part, ...] = ("attention", "linear", "other", "optimiser", "communication")
# Name of the optimiser's step in the profile, for `classify`.
OPTIMISER_REGION = "everest.optimiser"

# The first match counts, so communication during the optimiser's step is communication.
_RULES: dict[Part, str] = {
    "communication": r"(?i)nccl|^gloo:|c10d::|record_param_comms",
    "optimiser": rf"{re.escape(OPTIMISER_REGION)}|_fused_adam|FusedAdam",
    "attention": r"scaled_dot_product|ScaledDotProduct|flash|fmha|_efficient_attention|varlen_attn|sdpa",
    "linear": (
        r"(?i)^aten::(mm|addmm|bmm|baddbmm|addmv|mv|linear|matmul|\w*convolution\w*|conv[123]d|mkldnn_linear)$"
        r"|gemm|gemv|nvjet|cublas|cutlass|xmma|implicit_convolve|wgrad|dgrad"
    ),
}

Phase = Literal["forward", "backward", "update"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "update")
# Names of the calls of CUDA and HIP by which the host launches work: kernels, copies, fills, graphs.
_LAUNCH = re.compile(r"^(cuda|cu|hip)\w*(Launch|Memcpy|Memset)")


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """The profile of a step of one process, averaged over `PROFILED_STEPS`.

    Attributes:
        shares: Share of each part in the time of the step; None if the profile has no times.
        aten_calls: Calls of torch's operators by phase, including calls from other operators.
        kernel_launches: Launches by the host, by phase: kernels, copies, fills and captured graphs. A graph counts
            as one launch, whatever runs inside. None on a CPU.
        kernels: The longest kernels; see `longest_kernels`.
    """

    shares: dict[Part, float] | None
    aten_calls: dict[Phase, int]
    kernel_launches: dict[Phase, int] | None
    kernels: list[dict[str, Any]]

    def fields(self) -> dict[str, Any]:
        """Return the fields of a line of `everest benchmark step`."""
        launches = self.kernel_launches
        return {
            "shares": self.shares,
            "aten_calls": sum(self.aten_calls.values()),
            "aten_calls_by_phase": self.aten_calls,
            "kernel_launches": None if launches is None else sum(launches.values()),
            "kernel_launches_by_phase": launches,
            "kernels": self.kernels,
        }


def profile_step(device: torch.device, step: Callable[[], object], *, num_kernels: int = 0) -> StepProfile:
    """Profile `PROFILED_STEPS` steps, and return the average of one, with its ``num_kernels`` longest kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED_STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = list(profile.events() or ())
    shares = time_shares(events, device.type)
    calls = count_by_phase(events, lambda event: event.name.startswith("aten::"))
    launches = count_by_phase(events, _is_launch) if device.type == "cuda" else None
    return StepProfile(
        shares=None if shares is None else {part: round(share, 4) for part, share in shares.items()},
        aten_calls=calls,
        kernel_launches=launches,
        kernels=longest_kernels(events, device.type, num_kernels),
    )


def count_by_phase(events: Sequence[Any], counts: Callable[[Any], bool]) -> dict[Phase, int]:
    """Return how many of the host's events count in a step, by the phase in which they begin.

    The backward phase begins at the first event of autograd's engine. The update is the region `OPTIMISER_REGION`.
    A replayed graph is one launch in the forward phase, although it contains kernels of other phases.
    """
    seen: Counter[Phase] = Counter()
    phase: Phase = "forward"
    updated_at = 0.0
    on_host = (event for event in events if event.device_type == DeviceType.CPU)
    for event in sorted(on_host, key=lambda event: event.time_range.start):
        if event.name == OPTIMISER_REGION:
            phase, updated_at = "update", event.time_range.end
        elif phase == "update" and event.time_range.start >= updated_at:
            phase = "forward"
        if phase == "forward" and event.name.startswith("autograd::engine::"):
            phase = "backward"
        seen[phase] += counts(event)
    return {name: round(seen[name] / PROFILED_STEPS) for name in PHASES}


def _is_launch(event: Any) -> bool:
    """Return whether an event launches work on a GPU. A driver call inside a runtime call is the same launch."""
    parent = event.cpu_parent
    return bool(_LAUNCH.search(event.name)) and not (parent is not None and _LAUNCH.search(parent.name))


def longest_kernels(events: Sequence[Any], device_type: str, limit: int) -> list[dict[str, Any]]:
    """Return the kernels that take most of a step's time, with their share and number of calls.

    On a CPU: operators, by their self time.
    """
    micros: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in events:
        on_host = event.device_type == DeviceType.CPU
        if on_host == (device_type == "cuda") or (not on_host and event.is_user_annotation):
            continue
        micros[event.name] += event.self_cpu_time_total if on_host else event.time_range.elapsed_us()
        times[event.name] += 1
    total = sum(micros.values()) or 1
    return [
        {
            "name": name,
            "ms": round(spent / PROFILED_STEPS / 1e3, 4),
            "share": round(spent / total, 4),
            "times": round(times[name] / PROFILED_STEPS, 1),
        }
        for name, spent in micros.most_common(limit)
    ]


def classify(names: Iterable[str]) -> Part:
    """Return the part that a kernel belongs to, by its name and the names of the operators that called it."""
    names = list(names)
    return next((part for part, rule in _RULES.items() if any(re.search(rule, name) for name in names)), "other")


def time_shares(events: Sequence[Any], device_type: str) -> dict[Part, float] | None:
    """Return the share of each part in the time of a profile; shares sum to 1. None if there are no times.

    On CUDA, times of kernels are counted, each in full even if several overlap. On a CPU, self times of operators.
    """
    times = dict.fromkeys(PARTS, 0.0)
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    operators = ((_names_upwards(event), event.self_cpu_time_total) for event in on_cpu)
    for names, microseconds in _kernel_times(events) if device_type == "cuda" else operators:
        times[classify(names)] += microseconds
    total = sum(times.values())
    return {part: spent / total for part, spent in times.items()} if total else None


def _kernel_times(events: Sequence[Any]) -> Iterator[tuple[list[str], float]]:
    """Yield kernels with the operators that called them, then kernels without an operator (some of Triton's)."""
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
    return [] if event is None else [event.name, *_names_upwards(event.cpu_parent)]
