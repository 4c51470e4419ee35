"""bad_samples.jsonl: every draw of a run that could not be read, and the stop when they are too many."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from everest_ds import distributed
from everest_ds.data.clips.batch import BadSample, ClipBatch
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import append_json_lines


class BadSamples:
    """Counts unreadable draws of all processes and writes them down, on rank zero.

    Args:
        run_dir: The run directory.
        world: This process's place.
        max_share: Unreadable draws as a share of the list, or of all draws so far if more, above which a run stops.
        num_rows: Rows of the list.
        count: Draws that the run has written down before.
    """

    def __init__(self, run_dir: Path, world: World, *, max_share: float, num_rows: int, count: int) -> None:
        self.path = run_dir / "bad_samples.jsonl"
        self.world, self.max_share, self.num_rows = world, max_share, num_rows
        self.count = count

    def record(self, bad: Sequence[BadSample], draws: int) -> None:
        """Write down what all processes could not read since the last time; all of them call this.

        Args:
            bad: Those of this process.
            draws: Draws of all processes so far.

        Raises:
            UserError: They are too many.
        """
        everyone = [sample for part in distributed.gather_objects(list(bad)) for sample in part]
        if not everyone:
            return
        self.count += len(everyone)
        if self.world.is_main:
            self._write(everyone)
        draws = max(draws, self.num_rows)
        if self.count > self.max_share * draws:
            raise UserError(
                f"{self.count} of {draws} draws could not be read, more than data.max_bad_share={self.max_share}; "
                f"see {self.path}, mend the list or raise the share"
            )

    def require_whole(self, batch: ClipBatch, bad: Sequence[BadSample]) -> None:
        """Refuse a batch with a hole in it, and write down before what this process could not read.

        Raises:
            UserError: See `ClipBatch.require_whole`.
        """
        if batch.num_lost:
            self._write(bad)
        batch.require_whole()

    def _write(self, bad: Sequence[BadSample]) -> None:
        append_json_lines(self.path, [asdict(sample) for sample in bad])
