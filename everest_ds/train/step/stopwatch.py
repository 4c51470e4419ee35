"""Measures the time of work on a device without synchronising."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class Stopwatch:
    """Adds up the time of some work: device time on a GPU, else wall-clock time.

    Args:
        device: The device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._total_s = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time the work that is done or queued inside this block."""
        if not self._on_gpu:
            began = time.perf_counter()
            yield
            self._total_s += time.perf_counter() - began
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._pending.append((start, end))

    def total_s(self) -> float:
        """Return the seconds so far; work that a GPU has not finished counts in the next call."""
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.popleft()
            self._total_s += start.elapsed_time(end) / 1e3
        return self._total_s
