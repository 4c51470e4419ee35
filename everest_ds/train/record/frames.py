"""RUN/media/frames.jsonl: which frames a run chose, for pictures. Rank zero only.

A line at every log step:

    step                 the step in which the frames were chosen
    path                 the video: the first clip of this process's last micro-batch in the step
    candidate_frames     its frames that were read, by number in the video, or in the window that the list gives
    counts               chosen tokens of each candidate time step
    probabilities        probability of each candidate step to be drawn first: counts divided by their sum; null if
                         nothing changes
    steps                the candidate steps that were drawn, ascending
    frames               their frames, by number in the video
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
    """The part of a task that the log needs."""

    frame_choice: FrameChoice | None


class FrameLog(Callback):
    """Appends lines to RUN/media/frames.jsonl.

    A resumed run writes the lines of repeated steps again; readers use a step's last line.

    Args:
        run_dir: The run directory.
        rows: The training list.
        task: The task that chooses the frames.
    """

    def __init__(self, run_dir: Path, rows: Sequence[VideoRow], task: ChoosesFrames) -> None:
        self.path = run_dir / FRAMES_FILE
        self._rows, self._task = rows, task
        self._last: tuple[int, list[int]] | None = None

    def on_start(self) -> None:
        """Move malformed lines to another file; see `keep_lines`."""
        keep_lines(self.path, lambda line: has_step(line) and "path" in line, lambda number, line: True)

    def on_batch(self, batch: ClipBatch) -> None:
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
    """Return the choice for the first clip, as plain numbers; synchronises with the device.

    Raises:
        ValueError: The number of frames does not match the number of candidate steps.
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
