"""Scoring a classifier during training: the view in the middle of each video, on all processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from everest_ds.config import FinetuneConfig, ViewsConfig
from everest_ds.data.index import VideoRow
from everest_ds.data.views import ViewDataset
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.engine import shards_parameters
from everest_ds.train.scoring import Scores, score

MIDDLE = ViewsConfig(num_temporal=1, num_spatial=1)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Scores the list of validation videos.

    Attributes:
        rows: The list.
        config: The run.
        world: This process's place.
        device: Its device.
    """

    rows: Sequence[VideoRow]
    config: FinetuneConfig
    world: World
    device: torch.device

    def run(self, engine: Any) -> Scores:
        """Score the engine's model as it stands; all ranks take part and get the same scores.

        Raises:
            UserError: More of the videos are unreadable than data.max_bad_share allows.
        """
        engine.eval()
        with torch.no_grad():
            scores = score(
                engine,
                ViewDataset(self.rows, self.config.data, MIDDLE),
                world=self.world,
                device=self.device,
                group_size=self.config.batch.micro_size,
                same_rounds=shards_parameters(engine),
                allow_unreadable=True,
            )
        engine.train()
        share = self.config.data.max_bad_share
        if scores.num_unreadable > share * len(self.rows):
            first = scores.unreadable[0]
            raise UserError(
                f"{scores.num_unreadable} of {len(self.rows)} validation videos cannot be read, more than "
                f"data.max_bad_share={share}; the first is {first.path}: {first.reason}"
            )
        return scores
