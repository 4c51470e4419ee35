"""The interface of a tracker, and the names under which it shows the numbers of metrics.jsonl. Needs no torch.

TensorBoard shows groups, and names in a group, in the order of the alphabet: `train` with the loss first, `val`,
then pictures (`visual`), and `vitals` for the rest.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_FIRST = {
    "train": {"loss": "loss", "lr": "lr", "mfu": "mfu", "clips_per_s": "speed_clips_per_s", "stalled": "stalled"},
    "val": {"loss": "loss", "top1": "top1", "best_top1": "top1_best", "top5": "top5"},
}
SCORES = ("train/loss", "val/top1", "val/top1_best")
"""Numbers that runs are compared by."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker gets to know of a run when it is opened.

    Attributes:
        run_dir: The run directory; its name is the run's name.
        settings: Of the configuration, by dotted name.
        start_step: Steps taken before; what an interrupted run showed of later ones is taken back where possible.
        known_as: What this tracker called the run when it first opened it; None for a new run.
    """

    run_dir: Path
    settings: Mapping[str, str | int | float | bool]
    start_step: int
    known_as: str | None = None


class Tracker(ABC):
    """Shows one run; complete and connected when constructed. Rank zero only.

    Attributes:
        known_as: What the service calls the run, to find it again when it resumes; None where it needs no name.
    """

    known_as: str | None = None

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show finite numbers by name, such as `train/loss`."""

    @abstractmethod
    def text(self, name: str, text: str) -> None:
        """Show a JSON text by name."""

    @abstractmethod
    def image(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """Show a picture, uint8 RGB, by name."""

    def finish(self) -> None:  # noqa: B027  most services need nothing
        """Say that the run came to its end."""

    @abstractmethod
    def close(self) -> None:
        """Send what is not sent yet, and let go of the run."""


def shown_scalars(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics by the names that trackers show; none of an event.

    Texts, truth values, missing and infinite numbers are left out.
    """
    if kind == "event":
        return {}
    first, rest = _FIRST.get(kind, {}), "vitals" if kind == "train" else f"vitals/{kind}"
    return {
        f"{kind}/{first[name]}" if name in first else f"{rest}/{name}": value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def flat_settings(config: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Return nested settings by dotted names; what is no number, truth value or text becomes a text."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in flat_settings(value).items()}
        else:
            flat[name] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
