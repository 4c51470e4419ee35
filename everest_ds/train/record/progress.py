"""Progress of a run between two lines of metrics: what is counted, what is written, what is printed."""

import os
import time
from typing import Any

import torch
from torch import Tensor

from everest_ds.config import Config
from everest_ds.data.clips.batch import BadSample
from everest_ds.progress import format_duration
from everest_ds.train.optim_step import StepResult
from everest_ds.train.record.metrics import peak_memory_gib, peak_tflops
from everest_ds.train.schedule import Schedule

STALL_SHARE = 0.1
"""Share of the time spent waiting for clips above which people are told what to do."""
_LINES_BETWEEN_HINTS = 50


class Window:
    """What happened since the last line of metrics. What is on the device stays there until the line is due.

    Attributes:
        loss_sum: Of the steps that changed the weights, float64.
        updates: How many these are, int64.
        grad_norm: Of the last of them; nan before there was one.
        steps: All steps taken.
        tokens: Visible tokens of this process.
        data_wait_s: Seconds spent waiting for clips.
        started: When the window began, by the clock of time.perf_counter.
        bad: Videos that could not be read.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self.grad_norm = torch.full((), float("nan"), device=device)
        self.steps = 0
        self.tokens = 0
        self.data_wait_s = 0.0
        self.started = time.perf_counter()
        self.bad: list[BadSample] = []

    def add(self, losses: list[Tensor], result: StepResult) -> None:
        """Take in a step's losses and norm if it changed the weights; nothing is waited for."""
        mean = torch.stack(losses).to(torch.float64).mean()
        self.loss_sum += mean.where(result.applied, 0.0)
        self.updates += result.applied
        self.grad_norm = result.grad_norm.where(result.applied, self.grad_norm)

    def mean_loss(self) -> float:
        """Return this process's mean loss; nan when no step changed the weights. Waits for the device."""
        return float(self.loss_sum / self.updates)


def measure(
    window: Window, taken: int, loss: float, tokens: int, rates: list[float], config: Config, schedule: Schedule,
    flops: float,
) -> dict[str, Any]:  # fmt: skip
    """Return the values of a line of metrics, units in their names.

    Args:
        window: What happened on this process, and the longest wait of all.
        taken: Steps gone by.
        loss: Mean of all processes.
        tokens: Visible tokens of the window, of all processes.
        rates: Learning rates of the parameter groups.
        config: The run.
        schedule: Its steps.
        flops: Operations of a clip that fall to one process.
    """
    device = window.loss_sum.device
    seconds = (time.perf_counter() - window.started) / window.steps
    clips_per_s = config.batch.global_size / seconds
    peak = peak_tflops(device)
    used = clips_per_s * flops / 1e12
    return {
        "epoch": round(taken / schedule.steps_per_epoch, 4),
        "samples": taken * config.batch.global_size,
        "loss": loss,
        "grad_norm": float(window.grad_norm),
        "lr": max(rates),
        **({"lr_min": min(rates)} if min(rates) < max(rates) else {}),
        "weight_decay": config.optim.weight_decay,
        "clips_per_s": round(clips_per_s, 3),
        "tokens_per_s": round(tokens / window.steps / seconds, 1),
        "data_wait_ms": round(window.data_wait_s / window.steps * 1e3, 2),
        "stalled": round(min(window.data_wait_s / window.steps / seconds, 1.0), 4),
        "step_ms": round(seconds * 1e3, 2),
        "memory_gib": round(peak_memory_gib(device), 3),
        "mfu": None if peak is None else round(used / peak, 4),
    }


def print_progress(taken: int, end_step: int, values: dict[str, Any]) -> None:
    """Print a line of metrics for people, with the time that is left."""
    left = format_duration((end_step - taken) * values["step_ms"] / 1e3)
    mfu = "" if values["mfu"] is None else f"  mfu {values['mfu']:.1%}"
    print(
        f"step {taken}/{end_step}  epoch {values['epoch']:.2f}  loss {values['loss']:.4f}"
        f"  grad {values['grad_norm']:.3g}  lr {values['lr']:.2e}  {values['clips_per_s']:.1f} clips/s"
        f"  step {values['step_ms']:.0f} ms  data {values['data_wait_ms']:.0f} ms"
        f"  {values['memory_gib']:.2f} GiB{mfu}  ETA {left}",
        flush=True,
    )


class StallHint:
    """Says what to do when training waits for clips: once when it begins to, and again after many more lines.

    The first line of a run says nothing: its loader processes have only just begun.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lines = 0
        self._silent_until = 1

    def consider(self, values: dict[str, Any]) -> None:
        """Look at a line of metrics, and print the hint where it is due."""
        self._lines += 1
        if values["stalled"] <= STALL_SHARE or self._lines <= self._silent_until:
            return
        self._silent_until = self._lines + _LINES_BETWEEN_HINTS
        data, cores = self._config.data, len(os.sched_getaffinity(0))
        is_fastest = data.reader in ("auto", "pyav")
        faster_reader = "" if is_fastest else f"data.reader=pyav (now {data.reader}) decodes less; "
        print(
            f"note: {values['stalled']:.0%} of the time was spent waiting for clips. {data.num_workers} loader "
            f"processes for each training process here, {cores} CPU cores for all: raise data.num_workers while "
            f"cores are idle; {faster_reader}`everest prepare` makes videos "
            f"cheap to decode; data.repeats (now {data.repeats}) takes several clips from one decoding; `everest "
            f"benchmark data {self._config.recipe}` shows where the time goes",
            flush=True,
        )
