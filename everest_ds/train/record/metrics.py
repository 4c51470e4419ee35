"""metrics.jsonl, the record of a run, and TensorBoard as a view of it. Rank zero only."""

import contextlib
import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch

from everest_ds.files import read_whole_lines, write_atomically

# Dense bfloat16 peak in TFLOP/s, from the vendors' data sheets.
PEAK_BF16_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}


class MetricsLog:
    """Appends lines to RUN/metrics.jsonl and mirrors numbers to RUN/tensorboard/.

    Args:
        run_dir: The run directory.
        start_step: The step the run goes on from. What an interrupted run wrote of later steps is taken out: those
            steps are taken again, with the same numbers.
    """

    def __init__(self, run_dir: Path, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run_dir / "metrics.jsonl"
        if path.is_file():
            _drop_later_steps(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line and flush it; infinities and NaN, which JSON has not, become null."""
        line = {"kind": kind, "step": step, "time_s": round(time.time(), 3), **_finite(values)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def _drop_later_steps(path: Path, start_step: int) -> None:
    """Rewrite a record without measurements beyond a step, and without a line that a crash cut short."""
    kept = []
    for text in read_whole_lines(path):
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if line["kind"] == "event" or line["step"] <= start_step:
                kept.append(text)
    write_atomically(path, "".join(kept))


def drop_later_bad_samples(path: Path, num_bad: int) -> None:
    """Cut a record of unreadable draws back to those that a checkpoint has counted; the later ones come again."""
    if path.is_file():
        write_atomically(path, "".join(read_whole_lines(path)[:num_bad]))


def peak_tflops(device: torch.device) -> float | None:
    """Return the data sheet's bfloat16 peak of a GPU; None for the CPU and for GPUs not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_TFLOPS.items() if key in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far: allocated on the GPU, or resident for the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
