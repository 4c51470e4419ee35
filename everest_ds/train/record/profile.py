"""RUN/profile/step-XXXXXXXX.json.gz: a trace of a few steps, for https://ui.perfetto.dev.

The traced steps come after those in which kernels are chosen, a graph is captured and loader processes start.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from everest_ds.train.callbacks import Callback
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.step.updater import StepResult

SKIPPED_STEPS, WARMUP_STEPS, TRACED_STEPS = 4, 1, 3


class RunProfile(Callback):
    """Traces steps 6 to 8 of this launch, or fewer if it ends before. Rank zero only.

    Args:
        run_dir: The run directory.
        device: This rank's device.
        log: Prints the path of the trace.
    """

    def __init__(self, run_dir: Path, device: torch.device, log: MetricsLog) -> None:
        self._folder, self._log = run_dir / "profile", log
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        schedule = torch.profiler.schedule(wait=SKIPPED_STEPS, warmup=WARMUP_STEPS, active=TRACED_STEPS, repeat=1)
        self._profiler = torch.profiler.profile(
            activities=activities, schedule=schedule, on_trace_ready=self._write, record_shapes=True
        )
        self._is_running = False
        self._step = 0

    def on_start(self) -> None:
        self._profiler.start()
        self._is_running = True

    def on_step(self, step: int, losses: Sequence[Tensor], result: StepResult) -> None:
        if self._is_running:
            self._step = step
            self._profiler.step()

    def on_end(self, step: int) -> None:
        """Warn if the launch was too short for a trace."""
        if self._is_running:
            self._profiler.stop()
            needed = SKIPPED_STEPS + WARMUP_STEPS + 1
            if self._is_running:  # stopping wrote no trace
                self._is_running = False
                self._log.say(f"warning: run.profile traced nothing: it needs at least {needed} steps")

    def _write(self, profiler: torch.profiler.profile) -> None:
        self._is_running = False
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{self._step:08d}.json.gz"
        profiler.export_chrome_trace(str(path))
        self._log.say(f"traced steps up to {self._step}: {path} (open it in https://ui.perfetto.dev)")
