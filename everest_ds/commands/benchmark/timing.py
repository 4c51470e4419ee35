"""Time of repeated work, by the device's own clock, and what is said of many times."""

import math
import statistics
import time
from collections.abc import Sequence

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
