"""Pieces of work that are measured in turns, so that a machine whose speed wanders does not favour one of them.

Each round begins with another side. On a CPU the time is that of all threads (other work on the machine then
disturbs little), on a GPU wall time until it is done.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from everest_ds.commands.benchmark.timing import work_seconds


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
