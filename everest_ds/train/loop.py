"""The training loop: one for every task.

Place in the flow: loader -> task in the DeepSpeed engine -> optimiser step -> metrics, checkpoints. Between log
steps nothing waits for the device.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.config import Config
from everest_ds.data.dataset import BadSample, ClipBatch
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train import engine as engines
from everest_ds.train.checkpoint import TrainState, prune_checkpoints, save_checkpoint
from everest_ds.train.metrics import MetricsLog, format_duration, peak_memory_gib, peak_tflops
from everest_ds.train.optim import learning_rate
from everest_ds.train.tasks import ClipCost, PretrainTask


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of a run.

    Attributes:
        steps_per_epoch: Whole global batches of an epoch.
        start_step: Steps already taken.
        end_step: Steps to have taken at the end.
    """

    steps_per_epoch: int
    start_step: int
    end_step: int

    @classmethod
    def of(cls, config: Config, num_samples: int, start_step: int = 0) -> "Schedule":
        """Return the schedule of a configuration over a list of videos.

        Raises:
            UserError: The list is shorter than one global batch.
        """
        steps_per_epoch = num_samples // config.batch.global_size
        if steps_per_epoch == 0:
            raise UserError(
                f"the training list has {num_samples} videos, fewer than batch.global_size="
                f"{config.batch.global_size}; lower the batch or extend the list"
            )
        end_step = config.optim.epochs * steps_per_epoch
        if config.run.max_steps is not None:
            end_step = min(end_step, config.run.max_steps)
        return cls(steps_per_epoch=steps_per_epoch, start_step=start_step, end_step=end_step)


class Window:
    """What happened since the last line of metrics."""

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = 0
        self.data_wait_s = 0.0
        self.grad_norm: torch.Tensor | float | None = None
        self.started = time.perf_counter()
        self.bad: list[BadSample] = []


@dataclass(kw_only=True)
class Trainer:
    """Runs a task from one step to another.

    Attributes:
        engine: The DeepSpeed engine around the task.
        task: The task itself, for what it needs of a batch.
        config: The run.
        schedule: From which step to which.
        world: This process's place.
        device: Its device.
        run_dir: Where metrics and checkpoints go.
        log: The metrics, on rank zero only.
        start: Where the run stands at the start, and how it computes.
        dataset_size: Videos of the list, for the share of bad ones.
    """

    engine: Any
    task: PretrainTask
    config: Config
    schedule: Schedule
    world: World
    device: torch.device
    run_dir: Path
    log: MetricsLog | None
    start: TrainState
    dataset_size: int

    def __post_init__(self) -> None:
        """Start counting."""
        self.num_bad = self.start.num_bad
        self.cost: ClipCost = self.task.clip_cost()

    def run(self, batches: Iterator[ClipBatch]) -> None:
        """Train to the end of the schedule, logging and saving on the way.

        Raises:
            UserError: Too many unreadable videos, a loader that hangs, or a loss or gradient that is not finite.
        """
        self.engine.train()
        self.window = Window(self.device)
        self.skipped_steps = self.engine.skipped_steps
        for step in range(self.schedule.start_step, self.schedule.end_step):
            self._take_step(step, batches)
            taken = step + 1
            saves = self._saves_after(taken)
            if saves or taken % self.config.run.log_every_steps == 0:
                self._report(taken)
            if saves:
                self._save(taken)
                self.window = Window(self.device)

    def _take_step(self, step: int, batches: Iterator[ClipBatch]) -> None:
        rate = learning_rate(step, self.config.optim, self.config.batch, self.schedule.steps_per_epoch)
        engines.set_learning_rate(self.engine, rate)
        accumulation = self.engine.gradient_accumulation_steps()
        for _ in range(accumulation):
            waiting_since = time.perf_counter()
            batch = self._next_batch(batches)
            self.window.data_wait_s += time.perf_counter() - waiting_since
            self.window.bad += batch.bad
            if batch.num_lost:
                self._write_bad(self.window.bad)
                batch.require_whole()
            loss = self.engine(*self.task.inputs(batch, self.device))
            self.engine.backward(loss)
            norm = engines.step(self.engine)
            self.window.loss_sum += loss.detach() / accumulation
        self.window.steps += 1
        self.window.grad_norm = norm

    def _next_batch(self, batches: Iterator[ClipBatch]) -> ClipBatch:
        try:
            return next(batches)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            raise UserError(
                f"no batch from the loader for data.timeout_s={self.config.data.timeout_s}: a video may hang its "
                "decoder, or the storage does not answer; the last checkpoint is kept"
            ) from error

    def _saves_after(self, taken: int) -> bool:
        run = self.config.run
        if taken == self.schedule.end_step:
            return True
        if run.save_every_steps is not None and taken % run.save_every_steps == 0:
            return True
        return taken % (run.save_every_epochs * self.schedule.steps_per_epoch) == 0

    def _report(self, taken: int) -> None:
        """Reduce the window over all ranks, check it, write a line, print one, start the next window."""
        window, self.window = self.window, Window(self.device)
        losses = distributed.gather_over_ranks(float(window.loss_sum) / window.steps, self.device)
        seconds = (time.perf_counter() - window.started) / window.steps
        self._record_bad(window.bad, taken)
        self._require_finite(losses, window.grad_norm, taken)
        if self.log is None:
            return
        wait_s = window.data_wait_s / window.steps
        values = self._values(taken, sum(losses) / len(losses), window.grad_norm, seconds, wait_s)
        self.log.write("train", taken, **values)
        self._print(taken, values, seconds)

    def _require_finite(self, losses: list[float], norm: torch.Tensor | float | None, taken: int) -> None:
        """Stop, before anything is saved, when a loss or a gradient since the last line was not finite."""
        broken = [str(rank) for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        skipped = self.engine.skipped_steps - self.skipped_steps
        if broken:
            what = f"the loss of rank {', '.join(broken)}"
        elif skipped or (norm is not None and not math.isfinite(float(norm))):
            what = f"the gradient of {max(skipped, 1)} step(s)"
        else:
            return
        raise UserError(
            f"{what} is not finite at step {taken}; the last checkpoint is kept. "
            "Lower optim.base_lr, lengthen optim.warmup_epochs or set optim.max_grad_norm"
        )

    def _values(
        self, taken: int, loss: float, norm: torch.Tensor | float | None, seconds: float, wait_s: float
    ) -> dict[str, Any]:
        config = self.config
        clips_per_s = config.batch.global_size / seconds
        peak = peak_tflops(self.device)
        used = clips_per_s * self.cost.train_flops / self.world.size / 1e12
        return {
            "epoch": round(taken / self.schedule.steps_per_epoch, 4),
            "samples": taken * config.batch.global_size,
            "loss": loss,
            "grad_norm": None if norm is None else float(norm),
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            "weight_decay": config.optim.weight_decay,
            "clips_per_s": round(clips_per_s, 3),
            "tokens_per_s": round(clips_per_s * self.cost.tokens, 1),
            "data_wait_ms": round(wait_s * 1e3, 2),
            "step_ms": round(seconds * 1e3, 2),
            "memory_gib": round(peak_memory_gib(self.device), 3),
            "mfu": None if peak is None else round(used / peak, 4),
        }

    def _print(self, taken: int, values: dict[str, Any], seconds: float) -> None:
        left = format_duration((self.schedule.end_step - taken) * seconds)
        norm = "" if values["grad_norm"] is None else f"  grad {values['grad_norm']:.3g}"
        mfu = "" if values["mfu"] is None else f"  mfu {values['mfu']:.1%}"
        print(
            f"step {taken}/{self.schedule.end_step}  epoch {values['epoch']:.2f}  loss {values['loss']:.4f}{norm}"
            f"  lr {values['lr']:.2e}  {values['clips_per_s']:.1f} clips/s  step {values['step_ms']:.0f} ms"
            f"  data {values['data_wait_ms']:.0f} ms  {values['memory_gib']:.2f} GiB{mfu}  ETA {left}",
            flush=True,
        )

    def _record_bad(self, bad: list[BadSample], taken: int) -> None:
        """Write unreadable draws of all ranks to bad_samples.jsonl; stop when they are too many."""
        if not any(distributed.gather_over_ranks(len(bad), self.device)):
            return
        everyone = distributed.gather_objects(bad)
        self.num_bad += sum(len(part) for part in everyone)
        if self.world.is_main:
            self._write_bad([sample for part in everyone for sample in part])
        draws = max(taken * self.config.batch.global_size, self.dataset_size)
        share = self.config.data.max_bad_share
        if self.num_bad > share * draws:
            raise UserError(
                f"{self.num_bad} of {draws} draws could not be read, more than data.max_bad_share={share}; see "
                f"{self.run_dir / 'bad_samples.jsonl'}, mend the list or raise the share"
            )

    def _write_bad(self, bad: list[BadSample]) -> None:
        with (self.run_dir / "bad_samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(sample)) + "\n" for sample in bad)

    def _save(self, taken: int) -> None:
        state = replace(
            self.start,
            step=taken,
            epoch=taken // self.schedule.steps_per_epoch,
            samples=taken * self.config.batch.global_size,
            num_bad=self.num_bad,
        )
        started = time.perf_counter()
        folder = save_checkpoint(self.engine, self.run_dir, state, self.world)
        if self.world.is_main:
            epochs = self.config.run.keep_every_epochs
            prune_checkpoints(
                self.run_dir,
                keep_last=self.config.run.keep_checkpoints,
                keep_every_steps=epochs * self.schedule.steps_per_epoch if epochs else None,
            )
        if self.log is not None:
            took_s = round(time.perf_counter() - started, 2)
            self.log.write("event", taken, event="checkpoint", path=folder.name, took_s=took_s)
            print(f"saved {folder} in {took_s} s", flush=True)
