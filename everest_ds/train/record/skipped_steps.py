"""Steps that changed no weight because a gradient was not finite: found, told of, and counted.

Place in the flow: `train.optim_step` leaves a step out without waiting for the device; the loop settles here when a
line of metrics is due, and before anything is saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from everest_ds import distributed
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.record.metrics import MetricsLog

MAX_PATHS_SHOWN = 4


class _Pending(NamedTuple):
    """A step that was taken and not looked at yet: micro-steps' losses, whether it was applied, videos' rows."""

    step: int
    losses: list[Tensor]
    applied: Tensor
    rows: list[int]


@dataclass(kw_only=True)
class SkippedSteps:
    """Counts the steps of a run that were left out.

    Attributes:
        rows: The training list.
        allowed: How many there may be.
        count: How many there were.
        world: This process's place.
    """

    rows: Sequence[VideoRow]
    allowed: int
    count: int
    world: World

    def __post_init__(self) -> None:
        """Begin with nothing to look at."""
        self._pending: list[_Pending] = []

    def see(self, step: int, losses: list[Tensor], applied: Tensor, rows: list[int]) -> None:
        """Remember what is on the device, and which videos this process took; nothing is waited for.

        Args:
            step: Number of the step, from 1.
            losses: Of its micro-steps.
            applied: Whether it changed weights, a bool scalar, the same on all ranks.
            rows: Its videos on this process, as rows of the list.
        """
        self._pending.append(_Pending(step, losses, applied, rows))

    def settle(self, log: MetricsLog | None) -> None:
        """Look at the steps seen since the last time; all ranks call this together.

        Args:
            log: Where a skipped step is written, on rank zero only.

        Raises:
            UserError: One was left out beyond those allowed; names step, rank and samples.
        """
        seen, self._pending = self._pending, []
        if not seen:
            return
        for step, applied in zip(seen, torch.stack([step.applied for step in seen]).tolist(), strict=True):
            if not applied:
                self._record(step, log)

    def _record(self, pending: _Pending, log: MetricsLog | None) -> None:
        """Write down a step and the samples that may be at fault; stop at one too many."""
        self.count += 1
        finite = bool(torch.stack(pending.losses).isfinite().all())
        everyone = distributed.gather_objects((finite, [str(self.rows[row].path) for row in pending.rows]))
        suspects = {rank: paths for rank, (fine, paths) in enumerate(everyone) if not fine}
        what = f"the loss of rank {', '.join(map(str, suspects))}" if suspects else "a gradient, though no loss,"
        suspects = suspects or {rank: paths for rank, (_, paths) in enumerate(everyone)}
        if log is not None:
            named = {f"rank_{rank}": paths for rank, paths in suspects.items()}
            log.write("event", pending.step, event="skipped_step", num_skipped=self.count, samples=named)
        shown = [path for paths in suspects.values() for path in paths]
        listed = ", ".join(shown[:MAX_PATHS_SHOWN]) + (" ..." if len(shown) > MAX_PATHS_SHOWN else "")
        message = f"{what} is not finite at step {pending.step}, and no weight was changed; samples: {listed}"
        if self.count > self.allowed:
            raise UserError(
                f"{message} (all in metrics.jsonl); the last checkpoint is kept. Lower optim.base_lr, lengthen "
                "optim.warmup_epochs, set optim.max_grad_norm, or allow more than "
                f"run.max_skipped_steps={self.allowed}"
            )
        if self.world.is_main:
            print(f"warning: {message}; skipped, {self.count} of {self.allowed} allowed", flush=True)
