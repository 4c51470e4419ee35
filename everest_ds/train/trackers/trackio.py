"""The trackio tracker: a dashboard on this machine (`trackio show`), or in a Space set in the environment."""

import os
import uuid
from collections.abc import Mapping

import numpy as np

from everest_ds.train.trackers.base import TrackedRun, Tracker


class Trackio(Tracker):
    """A run in trackio, named by its folder and random characters; a resumed run continues it."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.known_as = run.known_as or f"{run.run_dir.resolve().name}-{uuid.uuid4().hex[:6]}"
        self._trackio = trackio
        project = os.environ.get("TRACKIO_PROJECT", "everest")
        trackio.init(project=project, name=self.known_as, config=dict(run.settings), resume="allow")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See the base class."""
        self._trackio.log(dict(values), step=step)

    def text(self, name: str, text: str) -> None:
        """See the base class."""
        self._trackio.log({name: self._trackio.Markdown(f"```\n{text}\n```")}, step=0)

    def image(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """See the base class."""
        self._trackio.log({name: self._trackio.Image(pixels_HWC)}, step=step)

    def close(self) -> None:
        """See the base class."""
        self._trackio.finish()
