"""The training loop: one for every task.

Place in the flow: loader -> task in the DeepSpeed engine -> optimiser step -> metrics, checkpoints. Between lines
of metrics the loop never synchronises with the device; `train.step.updater` lists where DeepSpeed does. Everything
else that a run does is a callback.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from everest_ds import pulse
from everest_ds.config import Config
from everest_ds.data.clips.batch import ClipBatch
from everest_ds.distributed import World
from everest_ds.train.callbacks import Callback
from everest_ds.train.checkpoints.owner import Owner
from everest_ds.train.checkpoints.save import Keeping, TrainState
from everest_ds.train.checkpoints.saving.saves import Saved, Saves
from everest_ds.train.checkpoints.saving.writer import Writer
from everest_ds.train.engine import set_learning_rate
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.record.progress import Window
from everest_ds.train.schedule import Schedule
from everest_ds.train.signals import EXIT_STOPPED, StopRequest
from everest_ds.train.step import garbage
from everest_ds.train.step.device_feed import DeviceFeed
from everest_ds.train.step.optim import learning_rate, require_scaled_rates
from everest_ds.train.step.updater import Updater
from everest_ds.train.tasks import Task


@dataclass(kw_only=True)
class Trainer:
    """Runs a task from one step to another.

    Attributes:
        engine: The DeepSpeed engine around the task, its checkpoint loaded.
        updater: Computes gradients and takes optimiser steps on the engine.
        task: The task inside the engine.
        config: The run.
        schedule: The first and the last step.
        world: This rank and the number of ranks.
        device: This rank's device.
        run_dir: The run directory.
        log: The metrics.
        start: The state of the run at the start of this launch.
        callbacks: Called in this order.
        writer: The process that writes checkpoints; None if the loop waits for them.
        owner: The owner that the run must still have when such a checkpoint is complete.
        stop: Whether a signal asked the run to stop.
    """

    engine: Any
    updater: Updater
    task: Task
    config: Config
    schedule: Schedule
    world: World
    device: torch.device
    run_dir: Path
    log: MetricsLog
    start: TrainState
    callbacks: Sequence[Callback] = ()
    writer: Writer | None = None
    owner: Owner | None = None
    stop: StopRequest = field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        """Prepare saves and the first window of metrics."""
        self._saves = Saves(
            engine=self.engine,
            run_dir=self.run_dir,
            world=self.world,
            on_saved=self._report_save,
            writer=self.writer,
            owner=self.owner,
        )
        self.clip_flops = self.task.clip_flops() / self.world.size
        self.window = Window(self.device)

    def run(self, batches: Iterator[ClipBatch]) -> int:
        """Train to the end of the schedule, logging, scoring and saving on the way.

        Returns:
            The steps taken: those of the schedule, or fewer if a signal stopped the run. All of them are saved.

        Raises:
            UserError: Too many unreadable videos, a loss or gradient that is not finite, or a checkpoint that
                cannot be written.
        """
        for callback in self.callbacks:
            callback.on_start()
        if self.schedule.num_left > 0:
            self._saves.reserve(sum(callback.checkpoint_bytes for callback in self.callbacks))
        taken = self._train(batches)
        for callback in self.callbacks:
            callback.on_end(taken)
        if taken >= self.schedule.end_step:
            self.log.write("event", taken, event="end")
        return taken

    def _train(self, batches: Iterator[ClipBatch]) -> int:
        self.engine.train()
        feed = DeviceFeed(batches, self.task.inputs, self.device)
        self.window = Window(self.device)
        last_saved = self.schedule.start_step
        with self.stop.listening(), garbage.held(), self._settling():
            for step in range(self.schedule.start_step, self.schedule.end_step):
                pulse.enter("between steps")
                self._saves.poll()
                signum = self.stop.agreed()
                if signum:
                    self._leave_early(step, signum, saved=last_saved == step)
                    return step
                self._take_step(step, feed)
                garbage.collect_after(step + 1)
                if self._log_and_save(step + 1):
                    last_saved = step + 1
            self._saves.finish()
        return max(self.schedule.start_step, self.schedule.end_step)

    @contextlib.contextmanager
    def _settling(self) -> Iterator[None]:
        """Complete a save in progress when an error ends the loop; its contents are from before the error."""
        try:
            yield
        except BaseException:
            self._saves.settle()
            raise

    def _take_step(self, step: int, feed: DeviceFeed) -> None:
        set_learning_rate(self.engine, self._rate(step))
        losses, result = [], None
        num_micro_steps = self.engine.gradient_accumulation_steps()
        for micro_step in range(num_micro_steps):
            waited_s = feed.waited_s
            pulse.enter(pulse.WAITING_FOR_CLIPS)
            batch, inputs = feed.next()
            self.window.data_wait_s += feed.waited_s - waited_s
            for callback in self.callbacks:
                callback.on_batch(batch)
            pulse.enter("computing gradients")
            losses.append(self.updater.forward_backward(inputs))
            feed.look_ahead()
            pulse.enter("updating weights")
            for callback in self.callbacks if micro_step + 1 == num_micro_steps else ():
                callback.before_update(step + 1)
            result = self.updater.step()
            self.window.tokens += self.task.visible_tokens
        assert result is not None  # the last micro-step completes the accumulation
        self.window.add(losses, result)
        for callback in self.callbacks:
            callback.on_step(step + 1, losses, result)

    def _rate(self, step: int) -> float:
        return learning_rate(step, self.config.optim, self.config.batch, self.schedule.steps_per_epoch)

    def _log_and_save(self, taken: int) -> bool:
        """Log and save what is due after a step; return whether a checkpoint was saved."""
        saves = self.schedule.saves_after(taken, self.config.run)
        # Lists, so that every callback is called on all ranks: `any` alone would stop at the first True.
        wanted = any([callback.wants_log(taken) for callback in self.callbacks])
        if saves or wanted or taken % self.config.run.log_every_steps == 0:
            self._log(taken)
            saves |= any([callback.wants_save(taken) for callback in self.callbacks])
        if saves:
            self._save(taken)
        if saves or wanted:  # so that saving and scoring do not count in the next window
            self.window = Window(self.device)
        return saves

    def _log(self, taken: int) -> None:
        """Write a line of metrics and start the next window."""
        pulse.enter("logging")
        for callback in self.callbacks:
            callback.before_log(taken)
        window, self.window = self.window, Window(self.device)
        global_size, groups = self.config.batch.global_size, self.engine.optimizer.param_groups
        measured = window.measure(taken, self.clip_flops, global_size)
        require_scaled_rates(groups, self._rate(taken - 1))
        rates = [group["lr"] for group in groups]
        values = {
            "epoch": round(taken / self.schedule.steps_per_epoch, 4),
            "samples": taken * global_size,
            "loss": measured["loss"],
            "grad_norm": measured["grad_norm"],
            "lr": max(rates),
            **({"lr_min": min(rates)} if min(rates) < max(rates) else {}),
            "weight_decay": self.config.optim.weight_decay,
            **measured,
        }
        self.log.write("train", taken, **values)
        for callback in self.callbacks:
            callback.on_log(taken, values)

    def _leave_early(self, taken: int, signum: Signals, *, saved: bool) -> None:
        """Save what is not saved yet, and print why the run ends here."""
        if not saved:
            if self.window.steps:
                self._log(taken)
            self._save(taken)
        self._saves.finish()
        where = f"after step {taken} of {self.schedule.end_step}, all saved"
        if taken == self.schedule.start_step:
            where = "before the first step, nothing was trained"
        self.log.write("event", taken, event="stopped", signal=signum.name)
        self.log.say(f"{signum.name}: stopped {where}; the same command resumes the run (exit code {EXIT_STOPPED})")

    def _save(self, taken: int) -> None:
        pulse.enter("saving")
        state = replace(
            self.start,
            step=taken,
            epoch=taken // self.schedule.steps_per_epoch,
            samples=taken * self.config.batch.global_size,
            threshold=self.task.threshold,
        )
        for callback in self.callbacks:
            state = callback.on_save(state)
        epochs = self.config.run.keep_every_epochs
        self._saves.save(
            state,
            Keeping(
                keep_last=self.config.run.keep_checkpoints,
                keep_every_steps=epochs * self.schedule.steps_per_epoch if epochs else None,
                best_step=state.best_step,
            ),
            extra_bytes=sum(callback.checkpoint_bytes for callback in self.callbacks),
            write_more=[callback.write_checkpoint for callback in self.callbacks if callback.checkpoint_bytes],
        )

    def _report_save(self, saved: Saved) -> None:
        times = {"took_s": round(saved.took_s, 2), "stalled_s": round(saved.stalled_s, 3)}
        self.log.write("event", saved.step, event="checkpoint", path=saved.folder.name, **times)
        behind = f", {saved.stalled_s:.2f} s of them between steps" if self.writer is not None else ""
        self.log.say(f"saved {saved.folder} in {saved.took_s:.2f} s{behind}")
