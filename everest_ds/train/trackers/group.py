"""The trackers of a run: checked early, opened together; a failing one never ends a training.

RUN/trackers.json   each service's name of the run, to find it again after a resume
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from everest_ds.config import TrackerName
from everest_ds.console.messages import say
from everest_ds.errors import UserError, escaped
from everest_ds.files import read_json_object, write_json
from everest_ds.train.trackers.base import TrackedRun, Tracker, shown_scalars
from everest_ds.train.trackers.mlflow import MLflow
from everest_ds.train.trackers.tensorboard import TensorBoard
from everest_ds.train.trackers.trackio import Trackio
from everest_ds.train.trackers.wandb import WeightsAndBiases

KNOWN_AS = "trackers.json"


class _Service(NamedTuple):
    """Constructor of a tracker, and its requirement for pip."""

    make: Callable[[TrackedRun], Tracker]
    requirement: str


SERVICES: dict[TrackerName, _Service] = {
    "tensorboard": _Service(TensorBoard, "tensorboard>=2.21"),
    "wandb": _Service(WeightsAndBiases, "wandb>=0.21"),
    "trackio": _Service(Trackio, "trackio>=0.20"),
    "mlflow": _Service(MLflow, "mlflow>=3.1"),
}


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        UserError: A package is missing; the message has the command that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"run.log_to={name} needs the package {name}, which is not installed; run "
                f"`pip install '{SERVICES[name].requirement}'`, or leave {name} out of --run.log-to"
            )


class Trackers:
    """The open trackers of a run; there may be none.

    A tracker that fails during training is reported once and not called again.
    """

    def __init__(self, names: Sequence[TrackerName] = ()) -> None:
        self._names = names
        self._open: dict[TrackerName, Tracker] = {}

    def open(self, run: TrackedRun, texts: Mapping[str, str]) -> None:
        """Open all trackers, each with the run's name from RUN/trackers.json, and show texts.

        Raises:
            UserError: A tracker cannot be opened, for example because there is no account or server.
        """
        path = run.run_dir / KNOWN_AS
        known_as = read_json_object(path) if path.is_file() else {}
        for name in self._names:
            named = known_as.get(name) if isinstance(known_as.get(name), str) else None
            try:
                tracker = SERVICES[name].make(replace(run, known_as=named))
            except Exception as error:
                lost = f", remove {name} from {path} if the run was deleted there" if named else ""
                raise UserError(
                    f"run.log_to={name} cannot be opened: {_first_line(error)}; fix that{lost}, "
                    f"or leave {name} out of --run.log-to"
                ) from error
            self._open[name] = tracker
            if tracker.known_as not in (None, named):
                known_as[name] = tracker.known_as
                write_json(path, known_as)
        self._each(lambda tracker: [tracker.text(title, text) for title, text in texts.items()])

    def line(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Show the numbers of a line of metrics."""
        scalars = shown_scalars(kind, values)
        if scalars:
            self._each(lambda tracker: tracker.scalars(scalars, step))

    def image(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """Show a picture, uint8 RGB, as `visual/NAME`."""
        self._each(lambda tracker: tracker.image(f"visual/{name}", pixels_HWC, step))

    def finish(self) -> None:
        """Mark the run as finished."""
        self._each(lambda tracker: tracker.finish())

    def close(self) -> None:
        """Close all."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, call: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:  # a failing service must not end a training; metrics.jsonl is complete
                del self._open[name]
                say(f"warning: run.log_to={name} failed and is off from now on: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return escaped(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")
