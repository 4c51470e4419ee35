"""Timing: marks in a device's stream, interleaved steps, and the best matmul rate."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

# Edges of the square matrices to try on a GPU: large enough to keep it busy, small compared with its memory.
EDGES = (4096, 8192, 16384)
MATMULS, MATMUL_WARMUP = 20, 5


class Marks:
    """Points in time between pieces of work: events in a GPU's stream without waiting, or wall time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Add a point after the work that was issued so far."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
        else:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()

    def seconds(self) -> list[float]:
        """Wait until the device has reached the last mark, and return the times from each mark to the next."""
        pairs = itertools.pairwise(self._marks)
        if self._device.type != "cuda":
            return [end - start for start, end in pairs]
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def work_seconds(device: torch.device) -> float:
    """Return a clock in seconds: CPU time of all threads, or, after waiting for the GPU, wall time.

    CPU time excludes the load of other programs on a shared machine. A GPU is expected to be ours alone.
    """
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def step_times(seconds: Sequence[float]) -> dict[str, float]:
    """Return median and p90 (the smallest time that nine tenths do not exceed) as fields of a line."""
    median, p90 = statistics.median(seconds), float(np.percentile(seconds, 90, method="inverted_cdf"))
    return {"step_ms_median": round(median * 1e3, 3), "step_ms_p90": round(p90 * 1e3, 3)}


@dataclass(frozen=True)
class Side:
    """One side of an interleaved measurement.

    ``step`` takes a step and returns its loss. ``clear`` then frees memory before the step of another side.
    """

    name: str
    step: Callable[[], float]
    clear: Callable[[], None] = lambda: None


@dataclass(kw_only=True)
class SideTimes:
    """Result of a side: seconds of each timed round, and loss of the last step."""

    seconds: list[float] = field(default_factory=list)
    loss: float = float("nan")
    peak_gib: float | None = None
    """Peak of the last step's allocations, without memory that was allocated before it; None on a CPU."""
    out_of_memory: bool = False
    """Whether the side ran out of memory; it is then left out of later rounds."""


def interleave(
    sides: Sequence[Side],
    device: torch.device,
    *,
    rounds: int,
    warmup: int,
    clock: Callable[[torch.device], float] = work_seconds,
) -> dict[str, SideTimes]:
    """Take a step of every side in each round, so that a drift of the machine's speed affects all sides equally.

    Each round begins with the next side. A side that runs out of memory takes no further steps.
    """
    found = {side.name: SideTimes() for side in sides}
    for number in range(warmup + rounds):
        first = number % len(sides)
        for side in (*sides[first:], *sides[:first]):
            times = found[side.name]
            if times.out_of_memory:
                continue
            held = 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)
            started = clock(device)
            try:
                times.loss = side.step()
            except torch.OutOfMemoryError:
                times.out_of_memory = True
            else:
                seconds = clock(device) - started
                if number >= warmup:
                    times.seconds.append(seconds)
                    if device.type == "cuda":
                        times.peak_gib = (torch.cuda.max_memory_allocated(device) - held) / 2**30
            side.clear()
            if times.out_of_memory:
                torch.cuda.empty_cache()
    return found


def matmul_tflops(device: torch.device, dtype: torch.dtype, edge: int, rounds: int = MATMULS) -> float:
    """Return the median rate of square matmuls in TFLOP/s; a multiply-accumulate counts as two operations.

    Both factors are random: a GPU multiplies zeros faster, because they need less power.
    """
    generator = torch.Generator(device).manual_seed(0)
    first, second = (torch.randn(edge, edge, device=device, generator=generator).to(dtype) for _ in range(2))
    out, marks = torch.empty_like(first), Marks(device)
    for number in range(MATMUL_WARMUP + rounds):
        if number >= MATMUL_WARMUP:
            marks.mark()
        torch.mm(first, second, out=out)
    marks.mark()
    return 2 * edge**3 / statistics.median(marks.seconds()) / 1e12


def measure_ceiling(device: torch.device) -> float | None:
    """Return the best bfloat16 rate of a GPU over `EDGES`, in TFLOP/s; None for a CPU."""
    if device.type != "cuda":
        return None
    best = max(matmul_tflops(device, torch.bfloat16, edge) for edge in EDGES)
    torch.cuda.empty_cache()
    return best
