"""The Weights & Biases tracker. Project and offline mode: WANDB_PROJECT and WANDB_MODE of the environment."""

import html
import os
import uuid
from collections.abc import Mapping

import numpy as np

from everest_ds.train.trackers.base import TrackedRun, Tracker


class WeightsAndBiases(Tracker):
    """A run in Weights & Biases; a resumed run continues it. Repeated steps are shown twice."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self.known_as = run.known_as or uuid.uuid4().hex[:12]
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "everest"),
            id=self.known_as,
            name=run.run_dir.resolve().name,
            dir=str(run.run_dir),
            config=dict(run.settings),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        # wandb's own step must not decrease, but that of a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See the base class."""
        self._run.log({**values, "step": step})

    def text(self, name: str, text: str) -> None:
        """See the base class."""
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def image(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """See the base class."""
        self._run.log({name: self._wandb.Image(pixels_HWC), "step": step})

    def close(self) -> None:
        """See the base class."""
        self._run.finish()
