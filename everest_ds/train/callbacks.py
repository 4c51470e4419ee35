"""What a run does besides its steps: one callback a concern. The loop calls them and knows none of them.

All ranks have the same callbacks in the same order, so that their collective operations meet; one that communicates
nothing may be on rank zero alone. Place in the flow: `training_run` builds them, `train.loop` calls them.
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

    Steps are numbered from 1. `on_batch` and `on_step` must not wait for the device.
    """

    checkpoint_bytes: int = 0
    """About how many bytes `write_checkpoint` adds; where none, it is not called. Alike on all ranks."""

    def on_start(self) -> None:
        """Before the first step: the run directory exists, and nothing can refuse the start any more."""

    def on_batch(self, batch: ClipBatch) -> None:
        """Before a micro-batch goes through the model."""

    def before_update(self, step: int) -> None:
        """After the gradients of a step were computed, before the weights change."""

    def on_step(self, step: int, losses: Sequence[Tensor], result: StepResult) -> None:
        """After an optimiser step; the losses are those of its micro-batches."""

    def wants_log(self, step: int) -> bool:
        """Whether a line of metrics is due after this step. The same on all ranks."""
        return False

    def before_log(self, step: int) -> None:
        """When a line of metrics is due, before it is made. May refuse to continue."""

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        """After a line of metrics was written; `values` are in it, those of this rank where ranks differ."""

    def wants_save(self, step: int) -> bool:
        """Whether a checkpoint is due after this step's line of metrics. The same on all ranks."""
        return False

    def on_save(self, state: TrainState) -> TrainState:
        """Return the state to be saved, with what this callback adds to it."""
        return state

    def write_checkpoint(self, files: CheckpointFiles) -> None:
        """Add more files to a checkpoint, before it is sealed."""

    def on_end(self, step: int) -> None:
        """After the last step of this start; also when no step was left to take."""
