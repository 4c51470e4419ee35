"""Reports ranks that are slower than their peers, because each step takes as long as the slowest rank."""

import statistics
import time
from collections.abc import Sequence

from torch import Tensor

from everest_ds import distributed, pulse
from everest_ds.train.callbacks import Callback
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.step.stopwatch import Stopwatch
from everest_ds.train.step.updater import StepResult

STEPS = 50
"""Steps between two comparisons."""
MARGIN = 0.1
"""A rank is slow whose own time exceeds its peers' median by this share."""


class SlowRanks(Callback):
    """Records an event `slow_rank` for each rank that was slow over `STEPS` steps.

    A rank's own time is that of loading, forward and backward, without waiting for other ranks. With DeepSpeed's
    own gradients, backward cannot be separated from waiting. Then the own time is that of loading only, and the
    margin is a share of the whole step.

    Args:
        log: The record.
        stopwatch: The time of forward and backward; None if it cannot be separated from waiting.
    """

    def __init__(self, log: MetricsLog, stopwatch: Stopwatch | None) -> None:
        self._log, self._stopwatch = log, stopwatch
        self._num_steps = 0
        self._before = (0.0, 0.0, 0.0)

    def on_start(self) -> None:
        self._before = self._measure()

    def on_step(self, step: int, losses: Sequence[Tensor], result: StepResult) -> None:
        """Compare the ranks every `STEPS` steps, by a small exchange on the host."""
        self._num_steps += 1
        if self._num_steps % STEPS:
            return
        now = self._measure()
        loading_s, computing_s, whole_s = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        everyone = distributed.gather_objects((loading_s, computing_s))
        least_s = 0.0 if self._stopwatch else whole_s
        for rank, own_s, peers_s in find_slow([sum(times) for times in everyone], least_s):
            self._log.write(
                "event",
                step,
                event="slow_rank",
                rank=rank,
                own_ms=round(own_s / STEPS * 1e3, 2),
                peers_ms=round(peers_s / STEPS * 1e3, 2),
                loading_ms=round(everyone[rank][0] / STEPS * 1e3, 2),
            )

    def _measure(self) -> tuple[float, float, float]:
        """Return seconds of loading, of computing and in total, each since an arbitrary start."""
        loading_s = pulse.PULSE.spent_s.get(pulse.WAITING_FOR_CLIPS, 0.0)
        return loading_s, self._stopwatch.total_s() if self._stopwatch else 0.0, time.perf_counter()


def find_slow(own_s: Sequence[float], least_s: float = 0.0) -> list[tuple[int, float, float]]:
    """Return each slow rank with its time and the median of its peers'.

    Args:
        own_s: The own time of every rank.
        least_s: The margin is a share of the median, or of this if it is larger.
    """
    slow = []
    for rank, seconds in enumerate(own_s):
        peers_s = statistics.median([other for peer, other in enumerate(own_s) if peer != rank] or [seconds])
        if seconds - peers_s > MARGIN * max(peers_s, least_s):
            slow.append((rank, seconds, peers_s))
    return slow
