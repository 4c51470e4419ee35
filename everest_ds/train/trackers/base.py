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
SCORES = ("train/loss", "val/top1", "val/top1_best", "test/top1")
"""Numbers that runs are compared by."""
TUNED: Mapping[str, str | int | float] = {
    "recipe": "", "precision": "", "model.size": "", "data.num_frames": 0, "batch.global_size": 0,
    "optim.base_lr": 0.0, "optim.epochs": 0, "optim.layer_decay": 0.0, "selection.strategy": "",
    "selection.selected_ratio": 0.0, "selection.visible_ratio": 0.0, "selection.keep_ratio": 0.0, "run.seed": 0,
    "changed": "",
}  # fmt: skip
"""Columns in which runs are compared, each with a value of its type. `changed` holds what else differs from the
recipe. All runs have the same columns: TensorBoard takes those of its table from any one of the runs.
"""
_NOT_COMPARED = (
    "run.", "data.train_list", "data.val_list", "data.test_list", "data.class_names", "data.num_classes",
    "batch.micro_size", "data.reader", "data.num_workers", "data.prefetch_batches", "data.timeout_s",
    "data.keep_decoded",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker gets to know of a run when it is opened.

    Attributes:
        run_dir: The run directory; its name is the run's name.
        settings: Of the configuration, by dotted name.
        compared: Those by which runs are compared: names of `TUNED`, as far as the run has them.
        start_step: Steps taken before; what an interrupted run showed of later ones is taken back where possible.
        known_as: What this tracker called the run when it first opened it; None for a new run.
    """

    run_dir: Path
    settings: Mapping[str, str | int | float | bool]
    compared: Mapping[str, str | int | float | bool]
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


def compared_settings(
    settings: Mapping[str, Any], of_recipe: Mapping[str, Any] | None, precision: str
) -> dict[str, str | int | float | bool]:
    """Return what runs are compared over.

    Args:
        settings: Of the run, flat.
        of_recipe: The recipe's own; None where this version has no such recipe, and `changed` is then left out.
        precision: What the run computes in.
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
    """Return nested settings by dotted names; what is no number, truth value or text becomes a text."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in flat_settings(value).items()}
        else:
            flat[name] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
