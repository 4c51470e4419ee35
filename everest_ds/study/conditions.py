"""Conditions that `everest study` compares, the paper's tables that they belong to, and the study's options.

A condition differs from the baseline only in the flags listed here: videos, steps, batches and the number of
visible tokens are the same. Conditions that differ only in fine-tuning share their pre-training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from everest_ds.errors import UserError, nearest_hint
from everest_ds.study.paired import MAX_SEEDS

BASELINE = "baseline"
NO_PRETRAINING = "none"

PRETRAININGS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "random": ("--selection.strategy", "random"),
    "tube": ("--selection.strategy", "tube", "--selection.selected-ratio", "1.0"),
    "running-cell": ("--selection.strategy", "running_cell", "--selection.selected-ratio", "0.5"),
    "ascending": ("--selection.order", "ascending"),
    # The learning rate of the first warm-up step is zero, so these are the initial weights.
    NO_PRETRAINING: ("--run.max-steps", "1"),
    "rho-0.2": ("--selection.selected-ratio", "0.2"),
    "rho-0.4": ("--selection.selected-ratio", "0.4"),
    "rho-0.5": ("--selection.selected-ratio", "0.5"),
    "l1": ("--selection.distance", "l1"),
    "cosine": ("--selection.distance", "cosine"),
    "cka": ("--selection.distance", "cka"),
    "alpha-1.5": ("--selection.alpha", "1.5"),
    "alpha-2.0": ("--selection.alpha", "2.0"),
    "budget-batch": ("--selection.budget", "batch"),
    "budget-threshold": ("--selection.budget", "threshold"),
}
"""Flags of `everest pretrain study` by the name of a pre-training."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One of `PRETRAININGS` with flags of `everest finetune study_ft`; ``is_main`` marks those of a quick study."""

    name: str
    pretraining: str
    finetune: tuple[str, ...] = ()
    is_main: bool = False


# Conditions of the physics world unless --only names others: those of the paper's Tables 2 and 17.
_OF_PHYSICS = (BASELINE, "random", "tube", NO_PRETRAINING)
_MAIN = (BASELINE, "random", "tube", "running-cell", "ascending", NO_PRETRAINING)
_ASCENDING = ("--selection.order", "ascending")

CONDITIONS = (
    *(Condition(name=name, pretraining=name, is_main=name in _MAIN) for name in PRETRAININGS),
    Condition(name="descending-ascending", pretraining=BASELINE, finetune=_ASCENDING),
    Condition(name="ascending-ascending", pretraining="ascending", finetune=_ASCENDING),
    Condition(name="ft-random", pretraining=BASELINE, finetune=("--selection.strategy", "random"), is_main=True),
    Condition(name="ft-rho-0.15", pretraining=BASELINE, finetune=("--selection.keep-ratio", "0.15")),
    Condition(name="ft-rho-0.6", pretraining=BASELINE, finetune=("--selection.keep-ratio", "0.6")),
    Condition(name="ft-all", pretraining=BASELINE, finetune=("--selection.keep-ratio", "1.0"), is_main=True),
    Condition(name="tube-all", pretraining="tube", finetune=("--selection.keep-ratio", "1.0")),
)


class Row(NamedTuple):
    """A condition's row in a table, with the paper's top-1 in percent, measured on its own data and models."""

    condition: str
    label: str
    paper: float | None = None


class Group(NamedTuple):
    """Conditions that one table of the paper compares; ``name`` is the stem of the plot's file name."""

    name: str
    title: str
    rows: tuple[Row, ...]


GROUPS = (
    Group("selection", "Selection in pre-training (paper Tables 2 and 17, UCF101)", (
        Row(BASELINE, "EVEREST: rero, rho 0.3", 93.4),
        Row("running-cell", "running cell, 0.5 predicted", 91.0),
        Row("tube", "tube, all predicted", 91.3),
        Row("tube-all", "tube, all predicted; fine-tuned on all tokens", 91.3),
        Row("random", "random, 0.3 selected"),
        Row("ascending", "least changing, 0.3 selected"),
        Row(NO_PRETRAINING, "no pre-training"),
    )),
    Group("order", "Most or least changing tokens, in pre-training / fine-tuning (paper Table 16, UCF101)", (
        Row(BASELINE, "descending / descending", 91.56),
        Row("descending-ascending", "descending / ascending", 75.60),
        Row("ascending", "ascending / descending", 73.49),
        Row("ascending-ascending", "ascending / ascending", 60.93),
    )),
    Group("rho-pretraining", "rho in pre-training (paper Table 10 left, UCF101)", (
        Row("rho-0.2", "0.2", 90.80),
        Row(BASELINE, "0.3", 91.56),
        Row("rho-0.4", "0.4", 91.51),
        Row("rho-0.5", "0.5", 90.91),
    )),
    Group("rho-fine-tuning", "Tokens in fine-tuning (paper Table 10 right, UCF101)", (
        Row("ft-rho-0.15", "rho 0.15"),
        Row(BASELINE, "rho 0.3"),
        Row("ft-rho-0.6", "rho 0.6", 91.56),
        Row("ft-all", "all", 89.71),
        Row("ft-random", "random, 0.3"),
    )),
    Group("distance", "Distance between tokens (paper Table 9, HMDB51)", (
        Row("cosine", "negative cosine", 33.53),
        Row("cka", "negative CKA", 34.58),
        Row("l1", "L1", 42.22),
        Row(BASELINE, "L2", 42.81),
    )),
    Group("alpha", "Frame selection in pre-training (paper Table 13, OSCC)", (
        Row(BASELINE, "none", 73.17),
        Row("alpha-1.5", "alpha 1.5", 73.85),
        Row("alpha-2.0", "alpha 2.0", 73.80),
    )),
    Group("budget", "Token budget in pre-training (not in the paper)", (
        Row(BASELINE, "a clip's"),
        Row("budget-batch", "shared by the batch"),
        Row("budget-threshold", "by a threshold"),
    )),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of a study: world, conditions, seeds and parallel runs."""

    world: Literal["discs", "physics"] = "discs"
    """discs: the class is which of four textured discs drifts. physics: the class is whether a block falls, a ball
    rolls, a pendulum swings or a rotor spins, simulated and drawn by MuJoCo (extra `physics`); four conditions."""
    quick: bool = False
    """Run only the main conditions, with half the steps and one seed unless --seeds is given."""
    seeds: tuple[int, ...] | None = None
    """Seeds of weights, order, selection and labelled videos. Default: 0 1 2; 0 to 5 in the physics world; 0 in a
    quick study."""
    jobs: int | None = None
    """Runs at the same time. Default: one per CPU core, or four per GPU."""
    only: tuple[str, ...] = ()
    """Names of the conditions to run. Default: all conditions of the world."""
    shake: int = 0
    """Camera shake in pixels, only in the discs world."""
    data_seed: int = 0
    """Seed of the videos."""

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"--jobs {self.jobs} must be at least 1")
        if self.seeds is not None and len(set(self.seeds)) < max(len(self.seeds), 1):
            raise UserError(f"--seeds {self.seeds} must be one or more different numbers")
        if self.seeds is not None and len(self.seeds) > MAX_SEEDS:
            raise UserError(f"--seeds names {len(self.seeds)} seeds, expected at most {MAX_SEEDS}")
        if self.shake and self.world != "discs":
            raise UserError(f"--shake {self.shake} has no effect with --world {self.world}; leave it out")
        if self.data_seed < 0:
            raise UserError(f"--data-seed {self.data_seed} must be at least 0")
        known = [condition.name for condition in CONDITIONS]
        for name in self.only:
            if name not in known:
                raise UserError(f"--only {name}: no such condition{nearest_hint(name, known)}")

    @property
    def conditions(self) -> list[Condition]:
        """Conditions to run: those named, or those of the world, or the main ones of a quick study."""
        if self.only:
            return [condition for condition in CONDITIONS if condition.name in self.only]
        if self.world == "physics":
            return [condition for condition in CONDITIONS if condition.name in _OF_PHYSICS]
        return [condition for condition in CONDITIONS if condition.is_main or not self.quick]

    @property
    def keep_ratio(self) -> float | None:
        """Share of tokens that probes and fine-tunings keep; None for the recipe's 0.3.

        About 15 % of the tokens change in the physics world.
        """
        return 0.15 if self.world == "physics" else None

    @property
    def seeds_to_run(self) -> tuple[int, ...]:
        """The seeds that were given, or the default ones of the world."""
        return self.seeds or ((0,) if self.quick else tuple(range(6 if self.world == "physics" else 3)))


@dataclass(frozen=True, kw_only=True)
class StudyJob:
    """A study and its output folder."""

    folder: Path
    options: StudyOptions
