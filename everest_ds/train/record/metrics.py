"""RUN/metrics.jsonl, the record of a run, which is also shown in trackers."""

import json
import math
import resource
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from everest_ds.console.messages import say
from everest_ds.train.record.lines import METRICS, is_measurement, keep_lines
from everest_ds.train.trackers.group import Trackers

# Dense bfloat16 peak in TFLOP/s, from the vendors' data sheets.
PEAK_BF16_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}


class MetricsLog:
    """Appends lines to RUN/metrics.jsonl and passes their numbers on to trackers.

    Args:
        run_dir: The run directory.
        start_step: The step that the run starts from. Measurements of later steps, left by an interrupted run, are
            removed, because those steps are repeated with the same numbers. See `keep_lines` for malformed lines.
        is_main: False on the ranks that record and print nothing.
        trackers: Where the numbers are shown; none by default. They are opened elsewhere, and closed here.
    """

    def __init__(
        self, run_dir: Path, start_step: int = 0, *, is_main: bool = True, trackers: Trackers | None = None
    ) -> None:
        self._run_dir, self._start_step, self._is_main = run_dir, start_step, is_main
        self._trackers = trackers or Trackers()
        self._file: TextIO | None = None

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line and flush it; infinities and NaN, which JSON lacks, become null."""
        if not self._is_main:
            return
        file = self._file or self._open()
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        file.write(json.dumps({"kind": kind, "step": step, "time_s": round(time.time(), 3), **finite}) + "\n")
        file.flush()
        self._trackers.line(kind, step, values)

    def image(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """Show a picture, uint8 RGB, in the trackers; it is not written to metrics.jsonl."""
        if self._is_main:
            self._trackers.image(name, pixels_HWC, step)

    def say(self, text: str) -> None:
        """Print a text on rank zero."""
        if self._is_main:
            say(text)

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._file is not None:
            self._file.close()
        self._trackers.close()

    def _open(self) -> TextIO:
        path, start_step = self._run_dir / METRICS, self._start_step
        keep_lines(path, is_measurement, lambda _, line: line["kind"] == "event" or line["step"] <= start_step)
        self._file = path.open("a", encoding="utf-8")
        return self._file


def peak_tflops(device: torch.device) -> float | None:
    """Return the data sheet's bfloat16 peak of a GPU; None for the CPU and for GPUs not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_TFLOPS.items() if key in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far: allocated on the GPU, or the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
