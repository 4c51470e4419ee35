"""Detects, reports and counts optimiser steps that were skipped because a gradient was not finite.

`train.step.updater` skips a step without synchronisation. Whether it did is checked when a line of metrics is due,
and so before anything is saved.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from everest_ds import distributed
from everest_ds.data.clips.batch import ClipBatch
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.errors import UserError
from everest_ds.train.callbacks import Callback
from everest_ds.train.checkpoints.save import TrainState
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.step.updater import StepResult

MAX_PATHS_SHOWN = 4


class _Pending(NamedTuple):
    """A step whose result has not been checked yet, with the rows of its videos on this rank."""

    step: int
    losses: Sequence[Tensor]
    applied: Tensor
    rows: list[int]


class SkippedSteps(Callback):
    """Ends a run that skips more steps than allowed.

    Args:
        rows: The training list.
        log: The record.
        allowed: Number of steps that may be skipped.
        count: Number of skipped steps when the run starts or resumes.
    """

    def __init__(self, rows: Sequence[VideoRow], log: MetricsLog, *, allowed: int, count: int) -> None:
        self.rows, self.log, self.allowed, self.count = rows, log, allowed, count
        self._seen_rows: list[int] = []
        self._pending: list[_Pending] = []

    def on_batch(self, batch: ClipBatch) -> None:
        self._seen_rows += batch.index_B.tolist()

    def on_step(self, step: int, losses: Sequence[Tensor], result: StepResult) -> None:
        self._pending.append(_Pending(step, losses, result.applied, self._seen_rows))
        self._seen_rows = []

    def before_log(self, step: int) -> None:
        """Check the steps since the last call.

        Raises:
            UserError: More steps were skipped than allowed; names step, rank and samples.
        """
        seen, self._pending = self._pending, []
        if not seen:
            return
        for pending, applied in zip(seen, torch.stack([one.applied for one in seen]).tolist(), strict=True):
            if not applied:
                self._record(pending)

    def on_save(self, state: TrainState) -> TrainState:
        return replace(state, num_skipped=self.count)

    def _record(self, pending: _Pending) -> None:
        """Record a skipped step and the samples that may have caused it; raise if too many were skipped."""
        self.count += 1
        finite = bool(torch.stack(list(pending.losses)).isfinite().all())
        everyone = distributed.gather_objects((finite, [str(self.rows[row].path) for row in pending.rows]))
        suspects = {rank: paths for rank, (fine, paths) in enumerate(everyone) if not fine}
        what = f"the loss of rank {', '.join(map(str, suspects))}" if suspects else "a gradient, though no loss,"
        suspects = suspects or {rank: paths for rank, (_, paths) in enumerate(everyone)}
        named = {f"rank_{rank}": paths for rank, paths in suspects.items()}
        self.log.write("event", pending.step, event="skipped_step", num_skipped=self.count, samples=named)
        shown = [path for paths in suspects.values() for path in paths]
        listed = ", ".join(shown[:MAX_PATHS_SHOWN]) + (" ..." if len(shown) > MAX_PATHS_SHOWN else "")
        message = f"{what} is not finite at step {pending.step}, and no weight was changed; samples: {listed}"
        if self.count > self.allowed:
            raise UserError(
                f"{message} (all in metrics.jsonl); the last checkpoint is kept. Lower optim.base_lr, lengthen "
                "optim.warmup_epochs, set optim.max_grad_norm, or allow more than "
                f"run.max_skipped_steps={self.allowed}"
            )
        self.log.say(f"warning: {message}; skipped, {self.count} of {self.allowed} allowed")
