"""Scores a classifier during training, on the middle view of each video, with all processes."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from everest_ds import pulse
from everest_ds.config import FinetuneConfig, ViewsConfig
from everest_ds.data.clips.views import ViewDataset
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.inference.confusion import draw_confusion
from everest_ds.inference.passes import Passes
from everest_ds.inference.scores import Scores, score
from everest_ds.train.callbacks import Callback
from everest_ds.train.checkpoints.save import TrainState
from everest_ds.train.ema import WeightAverage
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.schedule import Schedule

MIDDLE = ViewsConfig(num_temporal=1, num_spatial=1)


class Validation(Callback):
    """Scores the validation list every few epochs, and requests a checkpoint for each new best score.

    Args:
        engine: The DeepSpeed engine around the task.
        rows: The rows of the list.
        config: The configuration, with the number of classes.
        schedule: The steps of the run.
        world: The ranks.
        device: This rank's device.
        log: The record.
        average: The moving average of the weights; if there is one, it is scored instead of the model.
        start: The state at the start of the run, with the best score so far and its step.
        class_names: Names in the order of the labels; without names, numbers are shown.
    """

    def __init__(
        self,
        engine: Any,
        rows: Sequence[VideoRow],
        config: FinetuneConfig,
        schedule: Schedule,
        *,
        world: World,
        device: torch.device,
        log: MetricsLog,
        average: WeightAverage | None,
        start: TrainState,
        class_names: Sequence[str] = (),
    ) -> None:
        self._engine, self._rows, self._config, self._schedule = engine, rows, config, schedule
        self._world, self._device, self._log, self._average = world, device, log, average
        self._best_step, self._best_score = start.best_step, start.best_score
        self._class_names = class_names

    def wants_log(self, step: int) -> bool:
        """Whether scoring is due."""
        return self._schedule.validates_after(step, self._config.run.validate_every_epochs)

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        """Score the model if it is due, and record the scores."""
        if not self.wants_log(step):
            return
        started = time.perf_counter()
        with contextlib.nullcontext() if self._average is None else self._average.swapped():
            scores = self.run()
        is_best = self._best_score is None or scores.top1 > self._best_score
        if is_best:
            self._best_step, self._best_score = step, scores.top1
        self._log.write(
            "val",
            step,
            epoch=values["epoch"],
            weights="model" if self._average is None else "ema",
            top1=scores.top1,
            top5=scores.top5,
            loss=scores.loss,
            mean_class_accuracy=scores.mean_class_accuracy,
            num_scored=scores.num_scored,
            num_unreadable=len(scores.unreadable),
            is_best=is_best,
            best_step=self._best_step,
            best_top1=self._best_score,
            took_s=round(time.perf_counter() - started, 2),
        )
        self._log.say(f"step {step}  {_describe(scores)}{', the best so far' if is_best else ''}")
        if is_best and self._world.is_main:
            names = self._class_names or [str(label) for label in range(len(scores.confusion))]
            self._log.image("confusion", np.asarray(draw_confusion(scores.confusion, names)), step)

    def wants_save(self, step: int) -> bool:
        """Whether this step has the best score so far."""
        return self._best_step == step

    def on_save(self, state: TrainState) -> TrainState:
        """Add the best score and its step."""
        return replace(state, best_step=self._best_step, best_score=self._best_score)

    def run(self) -> Scores:
        """Score the engine's current model. All ranks must call it, and all get the same scores.

        Unreadable videos are left out and counted: one of them should not end a long run.

        Raises:
            UserError: More videos are unreadable than data.max_bad_share allows.
        """
        pulse.enter("scoring")
        data, engine = self._config.data, self._engine
        assert data.num_classes is not None
        engine.eval()
        passes = Passes(
            group_size=self._config.batch.micro_size,
            world=self._world,
            device=self._device,
            allow_unreadable=True,
            same_rounds=engine.zero_optimization_stage() == 3,
        )
        dataset = ViewDataset(self._rows, data, MIDDLE)
        scores = score(engine, dataset, data.num_classes, passes, progress="validation")
        engine.train()
        if len(scores.unreadable) > data.max_bad_share * len(self._rows):
            first = scores.unreadable[0]
            raise UserError(
                f"{len(scores.unreadable)} of {len(self._rows)} videos of {data.val_list} cannot be read, more "
                f"than data.max_bad_share={data.max_bad_share}; the first is {first.path}: {first.reason}"
            )
        return scores


def _describe(scores: Scores) -> str:
    top5 = "" if scores.top5 is None else f"  top-5 {scores.top5:.2%}"
    unreadable = f", {len(scores.unreadable)} unreadable" if scores.unreadable else ""
    shown = f"top-1 {scores.top1:.2%}{top5}  loss {scores.loss:.4f}"
    return f"validation  {shown}  on {scores.num_scored} videos{unreadable}"
