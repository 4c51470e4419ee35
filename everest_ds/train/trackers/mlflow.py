"""The MLflow tracker. Server and experiment: MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME of the environment."""

import os
from collections.abc import Mapping

import numpy as np

from everest_ds.train.trackers.base import TrackedRun, Tracker


class MLflow(Tracker):
    """A run in MLflow; a resumed run continues it. Repeated steps are shown twice."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow

        self._mlflow = mlflow
        self._status = "KILLED"
        if run.known_as is None:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "everest"))
            begun = mlflow.start_run(run_name=run.run_dir.resolve().name)
            mlflow.log_params(dict(run.settings))  # only at the first start: MLflow cannot change them
        else:
            begun = mlflow.start_run(run_id=run.known_as)
        self.known_as = begun.info.run_id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See the base class."""
        self._mlflow.log_metrics(dict(values), step=step)

    def text(self, name: str, text: str) -> None:
        """See the base class."""
        self._mlflow.log_text(text, f"{name}.json")

    def image(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """See the base class."""
        self._mlflow.log_image(pixels_HWC, key=name, step=step)

    def finish(self) -> None:
        """See the base class."""
        self._status = "FINISHED"

    def close(self) -> None:
        """See the base class; a run that stopped early gets the status KILLED."""
        self._mlflow.end_run(self._status)
