"""Scoring a classifier during training: the view in the middle of each video, on all processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from everest_ds.config import FinetuneConfig, ViewsConfig
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.inference.scores import Scores, score

MIDDLE = ViewsConfig(num_temporal=1, num_spatial=1)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Scores the list of validation videos.

    Attributes:
        rows: The list.
        config: The run, its classes counted.
        world: This process's place.
        device: Its device.
    """

    rows: Sequence[VideoRow]
    config: FinetuneConfig
    world: World
    device: torch.device

    def run(self, engine: Any) -> Scores:
        """Score the engine's model as it stands; all ranks take part and get the same scores.

        Unreadable videos are left out and counted: a night's training should not end for one of them.

        Raises:
            UserError: More of the videos are unreadable than data.max_bad_share allows.
        """
        data = self.config.data
        assert data.num_classes is not None
        engine.eval()
        scores = score(
            engine,
            self.rows,
            data=data,
            views=MIDDLE,
            num_classes=data.num_classes,
            world=self.world,
            device=self.device,
            group_size=self.config.batch.micro_size,
            allow_unreadable=True,
            same_rounds=engine.zero_optimization_stage() == 3,
            progress="validation",
        )
        engine.train()
        if len(scores.unreadable) > data.max_bad_share * len(self.rows):
            first = scores.unreadable[0]
            raise UserError(
                f"{len(scores.unreadable)} of {len(self.rows)} videos of {data.val_list} cannot be read, more than "
                f"data.max_bad_share={data.max_bad_share}; the first is {first.path}: {first.reason}"
            )
        return scores


def to_metrics(scores: Scores) -> dict[str, Any]:
    """Return the values of a line of metrics."""
    return {
        "top1": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "mean_class_accuracy": scores.mean_class_accuracy,
        "num_scored": scores.num_scored,
        "num_unreadable": len(scores.unreadable),
    }


def describe(scores: Scores) -> str:
    """Return the scores in words."""
    top5 = "" if scores.top5 is None else f"  top-5 {scores.top5:.2%}"
    unreadable = f", {len(scores.unreadable)} unreadable" if scores.unreadable else ""
    shown = f"top-1 {scores.top1:.2%}{top5}  loss {scores.loss:.4f}"
    return f"validation  {shown}  on {scores.num_scored} videos{unreadable}"
