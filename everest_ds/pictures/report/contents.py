"""What a page about runs shows, as plain data; texts may come out of foreign files, and are escaped when drawn."""

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
"""Curves that are drawn, with their titles, in this order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """A number over the steps of a run.

    Attributes:
        steps_P: float64, ascending, each once.
        values_P: float64, finite.
    """

    steps_P: NDArray[np.float64]
    values_P: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StoredPicture:
    """A picture file of a run, and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True, kw_only=True)
class ScoredList:
    """An evaluation.

    Attributes:
        name: Its folder.
        facts: What was scored and how well, by name.
        class_names: In the order of the labels.
        confusion: Counts by true and predicted class; None where the summary has no sound one.
        unreadable: How many videos could not be read, and the first of them, in words; empty for none.
    """

    name: str
    facts: Mapping[str, str]
    class_names: Sequence[str] = ()
    confusion: Sequence[Sequence[int]] | None = None
    unreadable: str = ""


@dataclass(frozen=True, kw_only=True)
class BadDraws:
    """Draws of a run that could not be read: how many, by reason (the most frequent first), and the first ones."""

    count: int = 0
    reasons: Sequence[tuple[str, int]] = ()
    first: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """A run, or an evaluation by itself.

    Attributes:
        path: Its folder, as it was named.
        state: One word: finished, training, stopped, hung, broken off, empty, or evaluation.
        facts: What it is and how far it came, by name.
        curves: By the names of `CURVES`; those without a point are left out.
        speed: Throughput and memory, by name.
        settings: By dotted name.
        environment: By dotted name.
        pictures: The newest ones.
        bad: Draws that could not be read.
        events: Time, step and text of what happened, in order.
        hangs: Name and text of each report of a hang, the newest first.
        scores: Its evaluations.
        notes: What of its files could not be read.
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
