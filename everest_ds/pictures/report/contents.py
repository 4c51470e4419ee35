"""Contents of a report as plain data. Texts may come from foreign files; they are escaped when drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CURVES = {
    "loss": "training loss",
    "lr": "learning rate",
    "val/top1": "top-1 of the validation videos, %",
    "clips_per_s": "clips/s",
    "data_wait_ms": "wait for clips, ms a step",
    "grad_norm": "gradient norm",
}
"""Curves and their titles, in the order in which they are drawn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """A measured value over the steps of a run.

    Attributes:
        steps_P: Steps, float64, strictly ascending.
        values_P: Values, float64, finite.
    """

    steps_P: NDArray[np.float64]
    values_P: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StoredPicture:
    """A picture file of a run, with its caption."""

    path: Path
    caption: str


@dataclass(frozen=True, kw_only=True)
class ScoredList:
    """An evaluation.

    Attributes:
        name: Name of its folder.
        facts: Settings and scores, by name.
        class_names: Names in the order of the labels.
        confusion: Counts by true and predicted class; None if the summary has no valid matrix.
        unreadable: How many videos could not be read, and the first of them, as text; empty for none.
    """

    name: str
    facts: Mapping[str, str]
    class_names: Sequence[str] = ()
    confusion: Sequence[Sequence[int]] | None = None
    unreadable: str = ""


@dataclass(frozen=True, kw_only=True)
class BadDraws:
    """Draws of a run that could not be read: their number, the reasons (most frequent first) and the first ones."""

    count: int = 0
    reasons: Sequence[tuple[str, int]] = ()
    first: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run, or an evaluation without its run.

    Attributes:
        path: The folder as the user named it.
        state: One of finished, training, stopped, hung, broken off, empty, evaluation.
        facts: State, recipe, progress and scores, by name.
        curves: Curves by the names of `CURVES`, without empty ones.
        speed: Throughput and memory, by name.
        settings: Settings by dotted name.
        environment: Versions and hardware by dotted name.
        pictures: The newest pictures.
        bad: Draws that could not be read.
        events: Time, step and text of each event, in order.
        hangs: Name and text of each report of a hang, newest first.
        scores: Evaluations of the run.
        notes: Messages about files that could not be read.
    """

    path: Path
    state: str
    facts: Mapping[str, str]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    speed: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    pictures: Sequence[StoredPicture] = ()
    bad: BadDraws = BadDraws()
    events: Sequence[tuple[str, int, str]] = ()
    hangs: Sequence[tuple[str, str]] = ()
    scores: Sequence[ScoredList] = ()
    notes: Sequence[str] = ()
