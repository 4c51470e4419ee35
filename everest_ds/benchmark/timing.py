"""Pieces of work that are measured in turns, so that a machine whose speed wanders does not favour one of them.

Each round begins with another side. On a CPU the time is that of all threads (other work on the machine then
disturbs little), on a GPU wall time until it is done.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


class Marks:
    """Points in time between pieces of work.

    On a GPU they are events in its stream, so that marking waits for nothing and host and device overlap as they do
    in a run; on a CPU, wall time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        """Set a mark."""
        if self.device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Return the times from each mark to the next, once the device has come to the last one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [_between(first, second) for first, second in zip(self._marks, self._marks[1:], strict=False)]


def work_seconds(device: torch.device) -> float:
    """Return a clock to measure one piece of work by: CPU time of all threads, or wall time once the GPU is done.

    CPU time leaves out what other programs take of a shared machine; on a GPU there is nobody else.
    """
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def ninetieth(values: Sequence[float]) -> float:
    """Return the smallest of the values that nine tenths of them do not exceed."""
    return sorted(values)[math.ceil(0.9 * len(values)) - 1]


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Return median and ninetieth percentile of times, as fields of a line."""
    return {
        "step_ms_median": round(statistics.median(seconds) * 1e3, 3),
        "step_ms_p90": round(ninetieth(seconds) * 1e3, 3),
    }


def _between(first: torch.cuda.Event | float, second: torch.cuda.Event | float) -> float:
    if isinstance(first, float) or isinstance(second, float):
        assert isinstance(first, float)
        assert isinstance(second, float)
        return second - first
    return first.elapsed_time(second) / 1e3


@dataclass(frozen=True)
class Side:
    """What takes turns.

    Attributes:
        name: Of the side.
        step: Takes one step and returns its loss.
        clear: Lets go of what the step leaves behind, so that it does not lie beside another side's work.
    """

    name: str
    step: Callable[[], float]
    clear: Callable[[], None]


@dataclass(kw_only=True)
class Outcome:
    """What became of a side.

    Attributes:
        seconds: Of each timed round.
        loss: Of the last step.
        peak_gib: The most that a step allocated beyond what lay there before it; None on a CPU.
        out_of_memory: Whether it ran out of memory; it has then no part in the rounds that follow.
    """

    seconds: list[float]
    loss: float = float("nan")
    peak_gib: float | None = None
    out_of_memory: bool = False


def take_turns(
    sides: Sequence[Side],
    device: torch.device,
    *,
    rounds: int,
    warmup: int,
    clock: Callable[[torch.device], float] = work_seconds,
) -> dict[str, Outcome]:
    """Let all sides take their steps in turns, each round beginning with the next side.

    A side that runs out of memory takes no further steps.
    """
    outcomes = {side.name: Outcome(seconds=[]) for side in sides}
    for number in range(warmup + rounds):
        first = number % len(sides)
        for side in (*sides[first:], *sides[:first]):
            outcome = outcomes[side.name]
            if outcome.out_of_memory:
                continue
            held = _reset_peak(device)
            started = clock(device)
            try:
                outcome.loss = side.step()
            except torch.OutOfMemoryError:
                outcome.out_of_memory = True
            else:
                seconds = clock(device) - started
                if number >= warmup:
                    outcome.seconds.append(seconds)
                    outcome.peak_gib = _peak_gib(device, held)
            side.clear()
            if outcome.out_of_memory:
                torch.cuda.empty_cache()
    return outcomes


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_gib(device: torch.device, held: int) -> float | None:
    return (torch.cuda.max_memory_allocated(device) - held) / 2**30 if device.type == "cuda" else None
