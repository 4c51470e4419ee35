"""RUN/bad_samples.jsonl: every draw of a run that could not be read. Too many of them end the run."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from everest_ds import distributed
from everest_ds.data.clips.batch import BadSample, ClipBatch
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import append_json_lines
from everest_ds.train.callbacks import Callback
from everest_ds.train.checkpoints.save import TrainState
from everest_ds.train.record.lines import keep_lines


class BadSamples(Callback):
    """Counts unreadable draws of all ranks; rank zero records them.

    Args:
        run_dir: The run directory.
        world: This rank and the number of ranks.
        max_share: End the run if more than this share of the draws so far was bad. At least the rows of the list
            are counted as draws.
        num_rows: Rows of the list.
        global_size: Clips of an optimiser step.
        count: Bad draws already recorded when the run starts or resumes.
    """

    def __init__(
        self, run_dir: Path, world: World, *, max_share: float, num_rows: int, global_size: int, count: int
    ) -> None:
        self.path = run_dir / "bad_samples.jsonl"
        self.world, self.max_share, self.num_rows, self.global_size = world, max_share, num_rows, global_size
        self.count = count
        self._unrecorded: list[BadSample] = []

    def on_start(self) -> None:
        """Remove the records of steps that will be repeated; see `keep_lines`."""
        if self.world.is_main:
            keep_lines(self.path, lambda line: "path" in line, lambda number, _: number < self.count)

    def on_batch(self, batch: ClipBatch) -> None:
        """Remember bad draws, and refuse a batch with missing clips.

        Raises:
            UserError: See `ClipBatch.require_whole`. This rank's bad draws are recorded first.
        """
        self._unrecorded += batch.bad
        if batch.num_lost:
            self._write(self._unrecorded)
        batch.require_whole()

    def before_log(self, step: int) -> None:
        """Record the bad draws of all ranks since the last call.

        Raises:
            UserError: There are too many bad draws.
        """
        everyone = [sample for part in distributed.gather_objects(self._unrecorded) for sample in part]
        self._unrecorded = []
        if not everyone:
            return
        self.count += len(everyone)
        if self.world.is_main:
            self._write(everyone)
        draws = max(step * self.global_size, self.num_rows)
        if self.count > self.max_share * draws:
            raise UserError(
                f"{self.count} of {draws} draws could not be read, more than data.max_bad_share={self.max_share}; "
                f"see {self.path}, repair the list or raise the share"
            )

    def on_save(self, state: TrainState) -> TrainState:
        return replace(state, num_bad=self.count)

    def _write(self, bad: Sequence[BadSample]) -> None:
        append_json_lines(self.path, [asdict(sample) for sample in bad])
