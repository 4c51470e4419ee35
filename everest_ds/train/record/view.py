"""Shows a run's steps: by one bar in a terminal, by lines elsewhere. Rank zero only."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from everest_ds.console import messages
from everest_ds.progress import format_duration
from everest_ds.train.callbacks import Callback
from everest_ds.train.schedule import Schedule
from everest_ds.train.step.updater import StepResult

tqdm.monitor_interval = 0  # tqdm starts no thread


class ProgressLines(Callback):
    """Prints a line after the first step of a launch, and one for every line of metrics.

    Args:
        schedule: The first and the last step.
        log_every_steps: Steps from one line of metrics to the next.
    """

    def __init__(self, schedule: Schedule, log_every_steps: int) -> None:
        self._schedule, self._every = schedule, log_every_steps
        self._is_first = True

    def on_step(self, step: int, losses: Sequence[Tensor], result: StepResult) -> None:
        """Report the first step of a launch, with rank zero's own loss; this synchronises."""
        if self._is_first and step % self._every:
            self.show_first(step, float(torch.stack(list(losses)).mean()))
        self._is_first = False

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        messages.say(describe_line(step, self._schedule.end_step, values))

    def show_first(self, step: int, loss: float) -> None:
        end, following = self._schedule.end_step, self._next(step)
        messages.say(f"step {step}/{end}  loss {loss:.4f}  (first of this start; next line after step {following})")

    def close(self) -> None:
        """Do nothing; a bar must be closed."""

    def _next(self, step: int) -> int:
        return min(step // self._every * self._every + self._every, self._schedule.end_step)


class ProgressBar(ProgressLines):
    """One bar at the bottom of a terminal, as wide as the terminal; messages are printed above it."""

    def __init__(self, schedule: Schedule, log_every_steps: int) -> None:
        super().__init__(schedule, log_every_steps)
        self._bar: tqdm[Any] | None = None

    def on_start(self) -> None:
        """Draw the empty bar."""
        self._bar = tqdm(
            total=self._schedule.end_step,
            initial=self._schedule.start_step,
            file=sys.stdout,
            bar_format="{bar}{n_fmt}/{total_fmt}{desc}",
            dynamic_ncols=True,
            leave=False,
        )
        self._bar.set_description_str(" waiting for the first clips")
        messages.write_by(lambda text: tqdm.write(text, file=sys.stdout))

    def on_step(self, step: int, losses: Sequence[Tensor], result: StepResult) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        super().on_step(step, losses, result)

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._bar.set_description_str(describe_briefly(step, self._schedule.end_step, values))

    def show_first(self, step: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_description_str(f" loss {loss:.4f}, speed after step {self._next(step)}")

    def on_end(self, step: int) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar; also called after a failure."""
        if self._bar is not None:
            messages.write_by(None)
            self._bar.close()
            self._bar = None


def make_view(schedule: Schedule, log_every_steps: int) -> ProgressLines:
    """Return a bar if stdout is a terminal and output is not quiet, else lines."""
    is_terminal = sys.stdout.isatty() and not messages.is_quiet()
    return (ProgressBar if is_terminal else ProgressLines)(schedule, log_every_steps)


def describe_line(step: int, end_step: int, values: Mapping[str, Any]) -> str:
    """Return a line of metrics as text, with the remaining time."""
    mfu = "" if values["mfu"] is None else f"  mfu {values['mfu']:.1%}"
    return (
        f"step {step}/{end_step}  epoch {values['epoch']:.2f}  loss {values['loss']:.4f}"
        f"  grad {values['grad_norm']:.3g}  lr {values['lr']:.2e}  {values['clips_per_s']:.1f} clips/s"
        f"  step {values['step_ms']:.0f} ms  data {values['data_wait_ms']:.0f} ms"
        f"  {values['memory_gib']:.2f} GiB{mfu}  ETA {_time_left(step, end_step, values)}"
    )


def describe_briefly(step: int, end_step: int, values: Mapping[str, Any]) -> str:
    """Return the numbers next to a bar: at most 67 characters for runs of up to 1000 epochs."""
    return (
        f" epoch {values['epoch']:.1f} loss {values['loss']:.3f} {values['clips_per_s']:.0f} clips/s"
        f" wait {values['stalled']:.0%} {values['memory_gib']:.3g} GiB ETA {_time_left(step, end_step, values)}"
    )


def _time_left(step: int, end_step: int, values: Mapping[str, Any]) -> str:
    return format_duration((end_step - step) * values["step_ms"] / 1e3)
