"""RUN/media/frames.jsonl: which frames a run chose, to draw pictures of. Rank zero only.

A line at every log step:

    step                 the step that it was chosen in
    path                 the video: the first clip of this process's last micro-batch of the step
    candidate_frames     its frames that were read, by number in the video, or in the window that the list gives
    counts               chosen tokens of each candidate time step
    probabilities        of each candidate step to be drawn first: counts by their sum; null where nothing changes
    steps                the candidate steps that were drawn, ascending
    frames               their frames, as numbers of the video's own
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from everest_ds.config import Config, PretrainConfig
from everest_ds.data.clips.batch import ClipBatch
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.files import append_json_lines
from everest_ds.model.frames import FrameChoice
from everest_ds.train.callbacks import Callback
from everest_ds.train.record.lines import has_step, keep_lines

FRAMES_FILE = Path("media") / "frames.jsonl"


def chooses_frames(config: Config) -> bool:
    """Return whether a run draws the frames of its clips from more candidates."""
    return isinstance(config, PretrainConfig) and config.candidate_steps > config.grid.time


class ChoosesFrames(Protocol):
    """A task, as far as the log needs it."""

    frame_choice: FrameChoice | None


class FrameLog(Callback):
    """Appends lines to RUN/media/frames.jsonl.

    A resumed run writes the lines of steps that it takes again once more: readers take a step's last line.

    Args:
        run_dir: The run directory.
        rows: The training list.
        task: What chooses the frames.
    """

    def __init__(self, run_dir: Path, rows: Sequence[VideoRow], task: ChoosesFrames) -> None:
        self.path = run_dir / FRAMES_FILE
        self._rows, self._task = rows, task
        self._last: tuple[int, list[int]] | None = None

    def on_start(self) -> None:
        """Set odd lines aside; see `keep_lines`."""
        keep_lines(self.path, lambda line: has_step(line) and "path" in line, lambda number, line: True)

    def on_batch(self, batch: ClipBatch) -> None:
        """Remember the first clip's row and frames."""
        self._last = int(batch.index_B[0]), batch.frames_BT[0].tolist()

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the line of a step."""
        choice = self._task.frame_choice
        assert self._last is not None
        assert choice is not None
        row, candidate_frames = self._last
        line = {"step": step, "path": str(self._rows[row].path), **describe_choice(candidate_frames, choice)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_json_lines(self.path, [line])


def describe_choice(candidate_frames: Sequence[int], choice: FrameChoice) -> dict[str, Any]:
    """Return what was chosen of the first clip, with plain numbers; waits for the device.

    Raises:
        ValueError: The frames are not those that were chosen from.
    """
    counts, steps = choice.counts_BC[0].tolist(), choice.steps_BT[0].tolist()
    tubelet_size, rest = divmod(len(candidate_frames), len(counts))
    if rest or not tubelet_size:
        raise ValueError(f"{len(candidate_frames)} candidate frames do not make {len(counts)} time steps")
    total = sum(counts)
    return {
        "candidate_frames": list(candidate_frames),
        "counts": counts,
        "probabilities": [round(count / total, 6) if total else None for count in counts],
        "steps": steps,
        "frames": [candidate_frames[step * tubelet_size + i] for step in steps for i in range(tubelet_size)],
    }
