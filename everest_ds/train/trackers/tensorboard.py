"""The TensorBoard tracker: event files in the run directory itself, so that a run has its folder's name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from everest_ds.train.trackers.base import SCORES, TUNED, TrackedRun, Tracker

EVENT_FILES = "events.out.tfevents.*"


class TensorBoard(Tracker):
    """Writes RUN/events.out.tfevents.*. A resumed run adds a file, which replaces repeated steps."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        run.run_dir.mkdir(parents=True, exist_ok=True)
        _move_older_files(run.run_dir)
        writer: Any = SummaryWriter(str(run.run_dir), purge_step=run.start_step + 1)
        columns, _, _ = hparams(dict(TUNED), dict.fromkeys(SCORES))
        _, begin, self._end = hparams(dict(run.compared), {})
        writer.file_writer.add_summary(columns)
        writer.file_writer.add_summary(begin)
        writer.add_custom_scalars({"overview": _overview(is_scored=run.settings.get("task") == "finetune")})
        writer.flush()
        self._writer = writer

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See the base class; other processes see the numbers at once."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def text(self, name: str, text: str) -> None:
        """See the base class."""
        self._writer.add_text(name, f"```\n{text}\n```")

    def image(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """See the base class."""
        self._writer.add_image(name, pixels_HWC, step, dataformats="HWC")

    def finish(self) -> None:
        """Mark the run as finished in the table of hyperparameters."""
        self._writer.file_writer.add_summary(self._end)

    def close(self) -> None:
        """See the base class."""
        self._writer.close()


def show_scores(folder: Path, scores: Mapping[str, float], picture_HWC: np.ndarray, step: int) -> None:
    """Show the scores of an evaluation as a run of its own, named by the folder of its results.

    The event file is not written into the run directory: TensorBoard follows only the newest file of a folder, and
    the run may be training.

    Args:
        folder: The folder of the results; its earlier event files are removed.
        scores: Numbers by name, such as `test/top1`.
        picture_HWC: The confusion matrix, uint8 RGB.
        step: Step of the checkpoint.
    """
    from torch.utils.tensorboard import SummaryWriter

    for path in folder.glob(EVENT_FILES):
        path.unlink()
    with SummaryWriter(str(folder)) as writer:
        for name, value in scores.items():
            writer.add_scalar(name, value, step)
        writer.add_image("test/confusion", picture_HWC, step, dataformats="HWC")


def _overview(*, is_scored: bool) -> dict[str, list[Any]]:
    """Return the charts of TensorBoard's tab Custom Scalars."""
    scores = {"top-1": ["val/top1", "test/top1"]} if is_scored else {}
    charts = {"loss": ["train/loss", "val/loss"]} | scores | {
        "clips per second": ["train/speed_clips_per_s"],
        "share of peak speed (MFU), share of time stalled": ["train/mfu", "train/stalled"],
        "learning rate": ["train/lr"],
    }  # fmt: skip
    return {title: ["Multiline", tags] for title, tags in charts.items()}


def _move_older_files(run_dir: Path) -> None:
    """Move the event files of an earlier version from RUN/tensorboard to RUN."""
    older = run_dir / "tensorboard"
    for path in sorted(older.glob(EVENT_FILES)):
        path.rename(run_dir / path.name)
    if older.is_dir() and not any(older.iterdir()):
        older.rmdir()


def viewing_command(run_dir: Path) -> list[str]:
    """Return the command that opens TensorBoard on the folder that contains this run and others.

    If that folder contains the working directory or the home folder, it may be large; then the run is opened alone.
    """
    parent = run_dir.resolve().parent
    is_wide = Path.cwd().is_relative_to(parent) or Path.home().is_relative_to(parent)
    return ["tensorboard", "--logdir", str(run_dir if is_wide else run_dir.parent)]
