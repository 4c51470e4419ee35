"""Where a run starts: afresh, from weights alone, or from a checkpoint, which may have to be resharded."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from everest_ds.console.messages import say
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.checkpoints.changes import accept_changes
from everest_ds.train.checkpoints.consolidated import load_initial_weights, restore_frozen_weights
from everest_ds.train.checkpoints.reshard import load_resharded, needs_resharding, universal_copy
from everest_ds.train.checkpoints.run_dir import Resume
from everest_ds.train.checkpoints.save import (
    TrainState,
    choose_checkpoint,
    read_state,
    require_same_start,
)
from everest_ds.train.checkpoints.shards import load_checkpoint, require_data
from everest_ds.train.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts.

    Attributes:
        run_dir: The run directory.
        state: The state of the run, with this launch's number of ranks and stage.
        checkpoint: The checkpoint to restore; None for a fresh run.
        was: Its state as written, with its own number of ranks and stage.
        damaged: Newer checkpoints that were skipped.
        init_from: Weights that a fresh run starts from, without optimiser states.
        init_allow: Names of those weights that may be initialised afresh or ignored.
        reshards: Whether the checkpoint must be converted for this number of ranks and stage.
        notes: Notes for the user on the run directory, and on changes since it was last trained.
    """

    run_dir: Path
    state: TrainState
    checkpoint: Path | None = None
    was: TrainState | None = None
    damaged: tuple[Path, ...] = ()
    init_from: Path | None = None
    init_allow: tuple[str, ...] = ()
    reshards: bool = False
    notes: tuple[str, ...] = ()

    @contextlib.contextmanager
    def ready(self, task: Task, world: World) -> Iterator[Callable[[Any], None]]:
        """Prepare the restore, and provide a function that loads it into a new engine; all ranks take part.

        Raises:
            UserError: The weights are of another model, the conversion fails, or DeepSpeed cannot load the shards.
        """
        if self.checkpoint is None or self.was is None:
            if self.init_from is not None:
                grid = task.config.grid
                report = load_initial_weights(task.model, self.init_from, allow=self.init_allow, clip_grid=grid)
                if world.is_main:
                    say(report.describe())
            yield lambda engine: None
        elif self.reshards:
            num_updates = self.was.step - self.was.num_skipped
            restore_frozen_weights(task, self.checkpoint)
            with universal_copy(self.checkpoint, world) as copy:
                yield lambda engine: load_resharded(engine, copy, num_updates)
        else:
            checkpoint = self.checkpoint
            yield lambda engine: load_checkpoint(engine, checkpoint)

    def describe(self) -> str | None:
        """Return in words what is restored; None for a fresh start."""
        if self.checkpoint is None or self.was is None:
            return f"weights from {self.init_from}, everything else fresh" if self.init_from else None
        was, now = self.was, self.state
        ignored = " (--init-from has an effect only at the start of a run)" if self.init_from else ""
        return (
            f"resumed from {self.checkpoint}: step {was.step}, epoch {was.epoch}, {was.samples} samples; "
            f"{was.world_size} processes at ZeRO-{was.zero_stage} then, {now.world_size} at "
            f"ZeRO-{now.zero_stage} now{ignored}"
        )


def choose_start(
    resume: Resume, now: TrainState, world: World, init_from: Path | None, init_allow: tuple[str, ...] = ()
) -> Start:
    """Return where a run starts; all ranks take part and agree. Nothing is written.

    Args:
        resume: The candidates.
        now: The state of a fresh run with this launch's ranks.
        world: This rank and the number of ranks.
        init_from: Weights for a fresh run; not used if there is a checkpoint to resume from.
        init_allow: Names of those weights that may be initialised afresh or ignored.

    Raises:
        UserError: All candidates are damaged, or the chosen one does not fit this run or has more than data.
    """
    if init_allow and init_from is None:
        raise UserError(f"--init-allow {' '.join(init_allow)} has no effect without --init-from; remove it")
    if init_from is not None and resume.exact:
        raise UserError(
            "--init-from starts a new run from weights alone, --resume PATH continues a run: give only one of them"
        )
    told: tuple[str, ...] = (resume.note,) if resume.note else ()
    checkpoint = choose_checkpoint(resume.candidates, world, exact=resume.exact)
    if checkpoint is None:
        return Start(run_dir=resume.run_dir, state=now, init_from=init_from, init_allow=init_allow, notes=told)
    was = read_state(checkpoint)
    require_same_start(checkpoint, was, now)
    require_data(checkpoint, world)
    state, changes = accept_changes(was, now)
    return Start(
        run_dir=resume.run_dir,
        state=replace(state, world_size=now.world_size, zero_stage=now.zero_stage),
        checkpoint=checkpoint,
        was=was,
        damaged=resume.candidates[: resume.candidates.index(checkpoint)],
        init_from=init_from,
        reshards=needs_resharding(was, now),
        notes=(*told, *changes),
    )
