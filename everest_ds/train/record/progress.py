"""The line of metrics: what a run measures between two lines, and hints for the user."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from everest_ds import distributed
from everest_ds.config import Config
from everest_ds.console.messages import say
from everest_ds.errors import UserError
from everest_ds.train.callbacks import Callback
from everest_ds.train.record.metrics import MetricsLog, peak_memory_gib, peak_tflops
from everest_ds.train.step.updater import StepResult

STALL_SHARE = 0.1
"""Share of the time spent waiting for clips above which the hint is printed."""
_LINES_BETWEEN_HINTS = 50


class Window:
    """Measurements since the last line of metrics. Tensors stay on the device until the line is due.

    Attributes:
        loss_sum: Sum of the losses of the steps that changed the weights, float64.
        updates: Number of these steps, int64.
        grad_norm: Gradient norm of the last of them; nan before the first.
        steps: Number of all steps.
        tokens: Visible tokens of this rank.
        data_wait_s: Seconds spent waiting for clips.
        started: When the window began, by the clock of time.perf_counter.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self.grad_norm = torch.full((), float("nan"), device=device)
        self.steps = 0
        self.tokens = 0
        self.data_wait_s = 0.0
        self.started = time.perf_counter()

    def add(self, losses: Sequence[Tensor], result: StepResult) -> None:
        """Add a step's losses, and its norm if it changed the weights; no synchronisation."""
        self.steps += 1
        mean = torch.stack(list(losses)).to(torch.float64).mean()
        self.loss_sum += mean.where(result.applied, 0.0)
        self.updates += result.applied
        self.grad_norm = result.grad_norm.where(result.applied, self.grad_norm)

    def measure(self, step: int, clip_flops: float, global_size: int) -> dict[str, Any]:
        """Return the measurements, with units in the names; all ranks take part.

        Args:
            step: Steps taken so far.
            clip_flops: Operations of a clip, divided by the number of ranks.
            global_size: Clips of a step.

        Raises:
            UserError: A loss or norm is not finite although weights were updated.
        """
        mean_loss = float(self.loss_sum / self.updates)
        reports = distributed.gather_objects((mean_loss, self.tokens, self.data_wait_s))
        losses, tokens, waits_s = zip(*reports, strict=True)
        broken = [f"loss of rank {rank}" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if not math.isfinite(float(self.grad_norm)):
            broken.append("gradient norm")
        if broken and int(self.updates):
            raise UserError(f"not finite at step {step}: {', '.join(broken)}; the last checkpoint is kept")
        device = self.loss_sum.device
        seconds = (time.perf_counter() - self.started) / self.steps
        wait_s = max(waits_s) / self.steps
        clips_per_s, peak = global_size / seconds, peak_tflops(device)
        return {
            "loss": sum(losses) / len(losses),
            "grad_norm": float(self.grad_norm),
            "clips_per_s": round(clips_per_s, 3),
            "tokens_per_s": round(sum(tokens) / self.steps / seconds, 1),
            "data_wait_ms": round(wait_s * 1e3, 2),
            "stalled": round(min(wait_s / seconds, 1.0), 4),
            "step_ms": round(seconds * 1e3, 2),
            "memory_gib": round(peak_memory_gib(device), 3),
            "mfu": None if peak is None else round(clips_per_s * clip_flops / 1e12 / peak, 4),
        }


class StallHint(Callback):
    """Prints what to do if training waits for clips: when it begins to wait, and again after many lines.

    The first line of a run is ignored, because its workers have just started. Rank zero only.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lines = 0
        self._silent_until = 1

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        """Print the hint if it is due."""
        self._lines += 1
        if values["stalled"] <= STALL_SHARE or self._lines <= self._silent_until:
            return
        self._silent_until = self._lines + _LINES_BETWEEN_HINTS
        data, cores = self._config.data, len(os.sched_getaffinity(0))
        is_fastest = data.reader in ("auto", "pyav")
        faster_reader = "" if is_fastest else f"data.reader=pyav (now {data.reader}) decodes less; "
        say(
            f"note: {values['stalled']:.0%} of the time was spent waiting for clips. {data.num_workers} loader "
            f"processes for each training process here, {cores} CPU cores for all: raise data.num_workers while "
            f"cores are idle; {faster_reader}`everest prepare` makes videos "
            f"cheap to decode; data.repeats (now {data.repeats}) takes several clips from one decoding; `everest "
            f"benchmark data {self._config.recipe}` shows where the time goes"
        )


class MemoryComparison(Callback):
    """Records the peak memory of the rank that needed most, and the estimate of `everest plan`.

    Args:
        log: The record.
        device: This rank's device.
        estimated_gib: The estimated peak of allocated memory.
    """

    def __init__(self, log: MetricsLog, device: torch.device, estimated_gib: float) -> None:
        self._log, self._device, self._estimated_gib = log, device, estimated_gib

    def on_end(self, step: int) -> None:
        """Write and print both."""
        peak_gib, expected = max(distributed.gather_objects(peak_memory_gib(self._device))), self._estimated_gib
        values = {"peak_gib": round(peak_gib, 3), "estimated_gib": round(expected, 3)}
        self._log.write("event", step, event="memory", device=self._device.type, **values)
        if self._device.type == "cuda":
            difference = f"({peak_gib / expected - 1:+.1%})"
            self._log.say(f"peak memory {peak_gib:.2f} GiB allocated, estimated {expected:.2f} {difference}")
        else:  # includes Python and its libraries
            self._log.say(f"peak resident memory {peak_gib:.2f} GiB, tensors estimated {expected:.2f}")
