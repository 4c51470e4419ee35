"""The steps of a run: how many an epoch has, the first and the last one, and when to save."""

from dataclasses import dataclass

from everest_ds.config import Config, RunConfig
from everest_ds.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of a run.

    Attributes:
        steps_per_epoch: Whole global batches in an epoch.
        start_step: Steps already taken at the start.
        end_step: Steps taken at the end.
    """

    steps_per_epoch: int
    start_step: int
    end_step: int

    @property
    def num_left(self) -> int:
        """Steps still to take; negative if the checkpoint is beyond the new end."""
        return self.end_step - self.start_step

    @classmethod
    def of(cls, config: Config, num_samples: int, start_step: int = 0) -> "Schedule":
        """Return the schedule over a list of videos; refuse a list that is shorter than one global batch."""
        steps_per_epoch = num_samples * config.data.repeats // config.batch.global_size
        if steps_per_epoch == 0:
            repeated = f" times data.repeats={config.data.repeats}" if config.data.repeats > 1 else ""
            raise UserError(
                f"the training list has {num_samples} videos{repeated}, fewer than batch.global_size="
                f"{config.batch.global_size}; lower the batch or extend the list"
            )
        end_step = config.optim.epochs * steps_per_epoch
        if config.run.max_steps is not None:
            end_step = min(end_step, config.run.max_steps)
        return cls(steps_per_epoch=steps_per_epoch, start_step=start_step, end_step=end_step)

    def saves_after(self, taken: int, run: RunConfig) -> bool:
        """Return whether a checkpoint is due after this many steps."""
        if taken == self.end_step:
            return True
        if run.save_every_steps is not None and taken % run.save_every_steps == 0:
            return True
        return taken % (run.save_every_epochs * self.steps_per_epoch) == 0

    def validates_after(self, taken: int, every_epochs: int) -> bool:
        return taken == self.end_step or taken % (every_epochs * self.steps_per_epoch) == 0
