"""The interface of callbacks: what a run does besides its steps, one callback for each concern.

All ranks have the same callbacks in the same order, so that their collective operations match. A callback that does
not communicate may be on rank zero only. Place in the flow: `training_run` builds them, `train.loop` calls them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from everest_ds.data.clips.batch import ClipBatch
from everest_ds.train.checkpoints.save import TrainState
from everest_ds.train.checkpoints.saving.files import CheckpointFiles
from everest_ds.train.step.updater import StepResult


class Callback:
    """One concern of a run. A hook that is not overridden does nothing.

    Steps are numbered from 1. `on_batch` and `on_step` must not synchronise with the device.
    """

    checkpoint_bytes: int = 0
    """About how many bytes `write_checkpoint` adds; if 0, it is not called. Equal on all ranks."""

    def on_start(self) -> None:
        """Before the first step, when the run directory exists and all checks of the start have passed."""

    def on_batch(self, batch: ClipBatch) -> None:
        """Before the forward pass of a micro-batch."""

    def before_update(self, step: int) -> None:
        """After the gradients of a step were computed, before the weights change."""

    def on_step(self, step: int, losses: Sequence[Tensor], result: StepResult) -> None:
        """After an optimiser step; the losses are those of its micro-batches."""

    def wants_log(self, step: int) -> bool:
        """Whether a line of metrics is due after this step. The same on all ranks."""
        return False

    def before_log(self, step: int) -> None:
        """When a line of metrics is due, before it is made. May raise to end the run."""

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        """After a line of metrics was written, with the values in it; where ranks differ, those of this rank."""

    def wants_save(self, step: int) -> bool:
        """Whether a checkpoint is due after this step's line of metrics. The same on all ranks."""
        return False

    def on_save(self, state: TrainState) -> TrainState:
        """Return the state to save, with this callback's additions."""
        return state

    def write_checkpoint(self, files: CheckpointFiles) -> None:
        """Add more files to a checkpoint, before it is sealed."""

    def on_end(self, step: int) -> None:
        """After the last step of this launch, also if it had no steps to take."""
