"""The training loop: one for every task.

Place in the flow: loader -> task in the DeepSpeed engine -> optimiser step -> metrics, checkpoints. Between lines
of metrics the loop never waits for the device; where DeepSpeed does, `train.optim_step` says.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.config import Config, FinetuneRunConfig
from everest_ds.data.clips.batch import ClipBatch
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.inference.validation import Validation, describe, to_metrics
from everest_ds.train.checkpoints.save import TrainState, point_to_best, prune_checkpoints, save_checkpoint
from everest_ds.train.device_feed import DeviceFeed
from everest_ds.train.ema import WeightAverage
from everest_ds.train.engine import set_learning_rate
from everest_ds.train.optim import learning_rate, require_scaled_rates
from everest_ds.train.optim_step import Updater
from everest_ds.train.record.bad_samples import BadSamples
from everest_ds.train.record.frames import FrameLog
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.record.progress import StallHint, Window, measure, print_progress
from everest_ds.train.record.skipped_steps import SkippedSteps
from everest_ds.train.schedule import Schedule
from everest_ds.train.signals import EXIT_STOPPED, StopRequest
from everest_ds.train.tasks import Task


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
        rows: The training list.
        groups: What the optimiser's groups come to, for the record.
        validation: What scores the model during training, if anything does.
        average: The moving average of the weights, if one is kept; it is scored in the model's place.
        stop: Whether somebody asked the run to stop.
    """

    engine: Any
    task: Task
    config: Config
    schedule: Schedule
    world: World
    device: torch.device
    run_dir: Path
    log: MetricsLog | None
    start: TrainState
    rows: Sequence[VideoRow]
    groups: Sequence[Mapping[str, float]] = ()
    validation: Validation | None = None
    average: WeightAverage | None = None
    stop: StopRequest = field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        """Start counting where the run stands."""
        self.bad_samples = BadSamples(
            self.run_dir,
            self.world,
            max_share=self.config.data.max_bad_share,
            num_rows=len(self.rows),
            count=self.start.num_bad,
        )
        self.stall_hint = StallHint(self.config)
        self.updater = Updater(self.engine, self.config.optim.max_grad_norm)
        self.skipped = SkippedSteps(
            rows=self.rows,
            allowed=self.config.run.max_skipped_steps,
            count=self.start.num_skipped,
            world=self.world,
        )
        self.best_step, self.best_score = self.start.best_step, self.start.best_score
        self.task.threshold = self.start.threshold
        self.clip_flops = self.task.clip_flops()
        self.frame_log = FrameLog.of(self.config, self.run_dir, self.rows, is_main=self.world.is_main)

    def run(self, batches: Iterator[ClipBatch]) -> int:
        """Train to the end of the schedule, logging, scoring and saving on the way.

        Returns:
            The steps taken: those of the schedule, or fewer when a signal stopped the run, all of them saved.

        Raises:
            UserError: Too many unreadable videos, a loss or gradient that is not finite, or a
                disk that takes no checkpoint.
        """
        self.engine.train()
        feed = DeviceFeed(batches, self.task.inputs, self.device)
        self.window = Window(self.device)
        last_saved = self.schedule.start_step
        with self.stop.listening():
            for step in range(self.schedule.start_step, self.schedule.end_step):
                signum = self.stop.agreed()
                if signum:
                    self._leave_early(step, signum, saved=last_saved == step)
                    return step
                self._take_step(step, feed)
                taken = step + 1
                saves = self.schedule.saves_after(taken, self.config.run)
                validation = self.validation if self._validates_after(taken) else None
                if saves or validation or taken % self.config.run.log_every_steps == 0:
                    self._report(taken)
                if validation and self._validate(validation, taken):
                    saves = True
                if saves:
                    self._save(taken)
                    last_saved = taken
                if saves or validation:
                    self.window = Window(self.device)
        return self.schedule.end_step

    def _take_step(self, step: int, feed: DeviceFeed) -> None:
        set_learning_rate(self.engine, self._rate(step))
        losses, rows_seen, result = [], [], None
        for _ in range(self.engine.gradient_accumulation_steps()):
            waited_s = feed.waited_s
            batch, inputs = feed.next()
            self.window.data_wait_s += feed.waited_s - waited_s
            self.window.bad += batch.bad
            self.bad_samples.require_whole(batch, self.window.bad)
            loss = self.engine(*inputs)
            self.engine.backward(loss)
            feed.look_ahead()
            result = self.updater.step()
            losses.append(loss.detach())
            self.window.tokens += self.task.visible_tokens
            rows_seen += batch.index_B.tolist()
        if self.frame_log is not None:
            self.frame_log.see(batch)
        self.window.steps += 1
        assert result is not None  # the last micro-step completes the accumulation
        self.window.add(losses, result)
        self.skipped.see(step + 1, losses, result.applied, rows_seen)
        if self.average is not None:
            self.average.update(result.applied)

    def _rate(self, step: int) -> float:
        return learning_rate(step, self.config.optim, self.config.batch, self.schedule.steps_per_epoch)

    def _report(self, taken: int) -> None:
        """Reduce the window over all ranks, check it, write a line, print one, start the next window."""
        self.skipped.settle(self.log)
        window, self.window = self.window, Window(self.device)
        num_updates = int(window.updates)
        reports = distributed.gather_objects((window.mean_loss(), window.tokens, window.data_wait_s))
        losses = [loss for loss, _, _ in reports]
        window.data_wait_s = max(wait_s for _, _, wait_s in reports)
        self.bad_samples.record(window.bad, taken * self.config.batch.global_size)
        broken = [f"loss of rank {rank}" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if not math.isfinite(float(window.grad_norm)):
            broken.append("gradient norm")
        if broken and num_updates:  # though nothing was a reason to leave the step out
            raise UserError(f"not finite at step {taken}: {', '.join(broken)}; the last checkpoint is kept")
        if self.log is None:
            return
        groups = self.engine.optimizer.param_groups
        require_scaled_rates(groups, self._rate(taken - 1))
        rates = [group["lr"] for group in groups]
        loss, tokens = sum(losses) / len(losses), sum(tokens for _, tokens, _ in reports)
        values = measure(
            window, taken, loss, tokens, rates, self.config, self.schedule, self.clip_flops / self.world.size
        )
        self.log.write("train", taken, **values)
        if self.frame_log is not None:
            self.frame_log.write(taken, self.task.frame_choice)
        print_progress(taken, self.schedule.end_step, values)
        self.stall_hint.consider(values)

    def _validates_after(self, taken: int) -> bool:
        run = self.config.run
        return isinstance(run, FinetuneRunConfig) and self.schedule.validates_after(
            taken, run.validate_every_epochs
        )

    def _validate(self, validation: Validation, taken: int) -> bool:
        """Score the model, or its average where one is kept; return whether it is the best so far."""
        started = time.perf_counter()
        with contextlib.nullcontext() if self.average is None else self.average.swapped():
            scores = validation.run(self.engine)
        is_best = self.best_score is None or scores.top1 > self.best_score
        if is_best:
            self.best_step, self.best_score = taken, scores.top1
        if self.log is not None:
            self.log.write(
                "val",
                taken,
                epoch=round(taken / self.schedule.steps_per_epoch, 4),
                weights="model" if self.average is None else "ema",
                **to_metrics(scores),
                is_best=is_best,
                best_step=self.best_step,
                took_s=round(time.perf_counter() - started, 2),
            )
            print(f"step {taken}  {describe(scores)}{', the best so far' if is_best else ''}", flush=True)
        return is_best

    def _leave_early(self, taken: int, signum: Signals, *, saved: bool) -> None:
        """Save what is not saved yet, and say why the run ends here."""
        if not saved:
            if self.window.steps:
                self._report(taken)
            self._save(taken)
        if self.log is not None:
            where = f"after step {taken} of {self.schedule.end_step}, all saved"
            if taken == self.schedule.start_step:
                where = "before the first step, nothing was trained"
            self.log.write("event", taken, event="stopped", signal=signum.name)
            print(
                f"{signum.name}: stopped {where}; the same command resumes the run (exit code {EXIT_STOPPED})",
                flush=True,
            )

    def _save(self, taken: int) -> None:
        state = replace(
            self.start,
            step=taken,
            epoch=taken // self.schedule.steps_per_epoch,
            samples=taken * self.config.batch.global_size,
            num_bad=self.bad_samples.count,
            num_skipped=self.skipped.count,
            best_step=self.best_step,
            best_score=self.best_score,
            threshold=self.task.threshold,
        )
        started = time.perf_counter()
        save_more = None if self.average is None else partial(self.average.save, world=self.world)
        folder = save_checkpoint(self.engine, self.run_dir, state, self.world, save_more=save_more)
        if self.world.is_main:
            point_to_best(self.run_dir, self.best_step)
            epochs = self.config.run.keep_every_epochs
            prune_checkpoints(
                self.run_dir,
                keep_last=self.config.run.keep_checkpoints,
                keep_every_steps=epochs * self.schedule.steps_per_epoch if epochs else None,
                keep_step=self.best_step,
            )
        if self.log is not None:
            took_s = round(time.perf_counter() - started, 2)
            self.log.write("event", taken, event="checkpoint", path=folder.name, took_s=took_s)
            print(f"saved {folder} in {took_s} s", flush=True)
