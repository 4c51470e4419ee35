"""Measures the parts of the time between the start of a process and its first step.

An event `first_step` of metrics.jsonl, after the first step of each launch:

    total_s    seconds since rank zero's process started
    parts_s    the same by part, in order of time: imports, meeting the other ranks, verifying the checkpoint, ...
"""

import time
from collections.abc import Sequence

from torch import Tensor

from everest_ds.data.clips.batch import ClipBatch
from everest_ds.processes import seconds_since_start
from everest_ds.train.callbacks import Callback
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.step.updater import StepResult


class StartTimes:
    """A stopwatch that starts with the process.

    Attributes:
        parts_s: Seconds by part, in order of time.
    """

    def __init__(self) -> None:
        self.parts_s: dict[str, float] = {}
        self._last = time.perf_counter() - seconds_since_start()

    @property
    def total_s(self) -> float:
        """Seconds from the start of the process to the end of the last part."""
        return sum(self.parts_s.values())

    def end(self, part: str) -> None:
        """Add the time since the end of the previous part to this part."""
        now = time.perf_counter()
        self.parts_s[part] = self.parts_s.get(part, 0.0) + now - self._last
        self._last = now

    def describe(self) -> str:
        """Return the total and its parts in one line."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts_s.items())
        return f"first step {self.total_s:.1f} s after the start of the process: {parts}"


class FirstStep(Callback):
    """Records the time that a launch took until its first step was done.

    Args:
        log: The record.
        times: The stopwatch; its last part ended when the engine was ready.
    """

    def __init__(self, log: MetricsLog, times: StartTimes) -> None:
        self._log, self._times, self._done = log, times, False

    def on_batch(self, batch: ClipBatch) -> None:
        """End the part that loads the first batch."""
        if "first batch" not in self._times.parts_s:
            self._times.end("first batch")

    def on_step(self, step: int, losses: Sequence[Tensor], result: StepResult) -> None:
        """Record the first step; on a GPU it has only been queued, with its graph captured."""
        if self._done:
            return
        self._done = True
        self._times.end("step")
        parts_s = {part: round(seconds, 2) for part, seconds in self._times.parts_s.items()}
        self._log.say(self._times.describe())
        self._log.write("event", step, event="first_step", total_s=round(self._times.total_s, 2), parts_s=parts_s)
