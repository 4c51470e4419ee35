"""The interface of a tracker, and the names under which it shows the numbers of metrics.jsonl. Needs no torch.

TensorBoard sorts groups, and names in a group, by the alphabet. Hence the groups `train` (with the loss first),
`val`, `visual` for pictures, and `vitals` for the rest.
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
"""Numbers by which runs are compared."""
TUNED: Mapping[str, str | int | float] = {
    "recipe": "", "precision": "", "model.size": "", "data.num_frames": 0, "batch.global_size": 0,
    "optim.base_lr": 0.0, "optim.epochs": 0, "optim.layer_decay": 0.0, "selection.strategy": "",
    "selection.selected_ratio": 0.0, "selection.visible_ratio": 0.0, "selection.keep_ratio": 0.0, "run.seed": 0,
    "changed": "",
}  # fmt: skip
"""Columns in which runs are compared, each with a value of its type. `changed` has the other differences from the
recipe. All runs must have the same columns, because TensorBoard takes the columns of its table from one run.
"""
_NOT_COMPARED = (
    "run.", "data.train_list", "data.val_list", "data.test_list", "data.class_names", "data.num_classes",
    "batch.micro_size", "data.reader", "data.num_workers", "data.prefetch_batches", "data.timeout_s",
    "data.keep_decoded",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run, as described to a tracker that opens it.

    Attributes:
        run_dir: The run directory; its name is the run's name.
        settings: Fields of the configuration by dotted name.
        compared: The fields by which runs are compared: those names of `TUNED` that the run has.
        start_step: Number of steps before this start. Values of later steps, shown before an interruption, are
            removed if the service allows it.
        known_as: The service's name of the run from its first start; None for a new run.
    """

    run_dir: Path
    settings: Mapping[str, str | int | float | bool]
    compared: Mapping[str, str | int | float | bool]
    start_step: int
    known_as: str | None = None


class Tracker(ABC):
    """Shows one run; connected when constructed. Rank 0 only.

    Attributes:
        known_as: The service's name of the run, to find it again after a resume; None if it needs no name.
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
        """Mark the run as finished."""

    @abstractmethod
    def close(self) -> None:
        """Send the remaining data and close the run."""


def shown_scalars(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics by the names that trackers show; empty for an event.

    Texts, booleans, and missing or infinite numbers are left out.
    """
    if kind == "event":
        return {}
    first, rest = _FIRST.get(kind, {}), "vitals" if kind == "train" else f"vitals/{kind}"
    return {
        f"{kind}/{first[name]}" if name in first else f"{rest}/{name}": value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def compared_settings(
    settings: Mapping[str, Any], of_recipe: Mapping[str, Any] | None, precision: str
) -> dict[str, str | int | float | bool]:
    """Return the settings by which runs are compared.

    Args:
        settings: The run's settings by dotted name.
        of_recipe: The recipe's settings; None if this version has no such recipe. `changed` is then left out.
        precision: Name of the run's precision.
    """
    known = {**settings, "precision": precision}
    if of_recipe is not None:
        known["changed"] = " ".join(
            f"{name}={value}"
            for name, value in settings.items()
            if value != of_recipe.get(name) and name not in TUNED and not name.startswith(_NOT_COMPARED)
        )
    return {name: known[name] for name in TUNED if name in known}


def flat_settings(config: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Return nested settings by dotted names; values other than numbers, booleans and texts become texts."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in flat_settings(value).items()}
        else:
            flat[name] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
