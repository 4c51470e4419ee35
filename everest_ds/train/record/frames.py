"""RUN/media/frames.jsonl: which frames a run chose, to draw pictures of. Rank zero only.

Place in the flow: batch and the task's last FrameChoice -> a line, at every log step. A line has

    step                 the step that it was chosen in
    path                 the video: the first clip of this process's last micro-batch of the step
    candidate_frames     its frames that were read, by number in the video, or in the window that the list gives
    counts               chosen tokens of each candidate time step
    probabilities        of each candidate step to be drawn first: counts by their sum; null where nothing changes
    steps                the candidate steps that were drawn, ascending
    frames               their frames, as numbers of the video's own
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from everest_ds.config import Config, PretrainConfig
from everest_ds.data.clips.batch import ClipBatch
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.files import append_json_lines, drop_torn_line
from everest_ds.model.frames import FrameChoice

FRAMES_FILE = Path("media") / "frames.jsonl"


class FrameLog:
    """Appends lines to RUN/media/frames.jsonl.

    A run that goes on from a checkpoint takes the steps after it again and writes their lines again: a reader that
    wants one line a step takes the last. A line that a crash cut short is taken out.

    Args:
        run_dir: The run directory.
        rows: The training list.
    """

    def __init__(self, run_dir: Path, rows: Sequence[VideoRow]) -> None:
        self.path = run_dir / FRAMES_FILE
        self._rows = rows
        self._last: tuple[int, list[int]] | None = None
        drop_torn_line(self.path)

    @classmethod
    def of(cls, config: Config, run_dir: Path, rows: Sequence[VideoRow], *, is_main: bool) -> "FrameLog | None":
        """Return the log of a run that chooses frames, on rank zero; None of any other."""
        if not is_main or not isinstance(config, PretrainConfig) or config.candidate_steps == config.grid.time:
            return None
        return cls(run_dir, rows)

    def see(self, batch: ClipBatch) -> None:
        """Remember which video the first clip of a micro-batch is of, and which frames; the device is not asked."""
        self._last = int(batch.index_B[0]), batch.frames_BT[0].tolist()

    def write(self, step: int, choice: FrameChoice | None) -> None:
        """Append the line of a step: the clip that was seen last, and what was chosen of it.

        Raises:
            ValueError: No batch was seen, or its frames were not chosen from.
        """
        if self._last is None or choice is None:
            raise ValueError(f"no frames were chosen at step {step}")
        index, candidate_frames = self._last
        line = {"step": step, "path": str(self._rows[index].path), **describe_choice(candidate_frames, choice)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_json_lines(self.path, [line])


def describe_choice(candidate_frames: Sequence[int], choice: FrameChoice) -> dict[str, Any]:
    """Return what was chosen of the first clip, with plain numbers; waits for the device.

    Raises:
        ValueError: The frames are not those that were chosen from.
    """
    counts, steps = _first_row(choice.counts_BC), _first_row(choice.steps_BT)
    tubelet_size, rest = divmod(len(candidate_frames), len(counts))
    if rest or not tubelet_size:
        raise ValueError(f"{len(candidate_frames)} candidate frames do not make {len(counts)} time steps")
    total = sum(counts)
    return {
        "candidate_frames": list(candidate_frames),
        "counts": counts,
        "probabilities": [round(count / total, 6) if total else None for count in counts],
        "steps": steps,
        "frames": [
            candidate_frames[step * tubelet_size + place] for step in steps for place in range(tubelet_size)
        ],
    }


def _first_row(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor[0].tolist()]
