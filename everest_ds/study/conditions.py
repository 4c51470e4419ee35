"""What `everest study` compares, as data: pre-trainings, fine-tunings of them, and the paper's tables.

A condition differs from the baseline in the flags that are listed here and in nothing else: the same videos, steps,
batches and number of visible tokens. Conditions that differ in fine-tuning alone share their pre-training.
"""

from dataclasses import dataclass

BASELINE = "baseline"
NO_PRETRAINING = "none"

PRETRAININGS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "random": ("--selection.strategy", "random"),
    "tube": ("--selection.strategy", "tube", "--selection.selected-ratio", "1.0"),
    "running-cell": ("--selection.strategy", "running_cell", "--selection.selected-ratio", "0.5"),
    "ascending": ("--selection.order", "ascending"),
    # The first step of warm-up has rate zero: these are the weights that a run starts from.
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
    """One way of pre-training and fine-tuning.

    Attributes:
        name: Its name, also of its folder.
        pretraining: One of `PRETRAININGS`.
        finetune: Flags of `everest finetune study_ft`.
        is_main: Whether it is part of a quick study.
    """

    name: str
    pretraining: str
    finetune: tuple[str, ...] = ()
    is_main: bool = False


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


@dataclass(frozen=True, kw_only=True)
class Row:
    """A condition's place in a table.

    Attributes:
        condition: Its name.
        label: What the table calls it.
        paper: The paper's top-1 in percent, on other data and other models; None where it has none.
    """

    condition: str
    label: str
    paper: float | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Conditions that one table of the paper compares.

    Attributes:
        name: Short, for a file's name.
        title: What is compared, and where the paper does.
        rows: The conditions.
    """

    name: str
    title: str
    rows: tuple[Row, ...]


GROUPS = (
    Group(
        name="selection",
        title="Selection in pre-training (paper Tables 2 and 17, UCF101)",
        rows=(
            Row(condition=BASELINE, label="EVEREST: rero, rho 0.3", paper=93.4),
            Row(condition="running-cell", label="running cell, 0.5 predicted", paper=91.0),
            Row(condition="tube", label="tube, all predicted", paper=91.3),
            Row(condition="tube-all", label="tube, all predicted; fine-tuned on all tokens", paper=91.3),
            Row(condition="random", label="random, 0.3 selected"),
            Row(condition="ascending", label="least changing, 0.3 selected"),
            Row(condition=NO_PRETRAINING, label="no pre-training"),
        ),
    ),
    Group(
        name="order",
        title="Most or least changing tokens, in pre-training / fine-tuning (paper Table 16, UCF101)",
        rows=(
            Row(condition=BASELINE, label="descending / descending", paper=91.56),
            Row(condition="descending-ascending", label="descending / ascending", paper=75.60),
            Row(condition="ascending", label="ascending / descending", paper=73.49),
            Row(condition="ascending-ascending", label="ascending / ascending", paper=60.93),
        ),
    ),
    Group(
        name="rho-pretraining",
        title="rho in pre-training (paper Table 10 left, UCF101)",
        rows=(
            Row(condition="rho-0.2", label="0.2", paper=90.80),
            Row(condition=BASELINE, label="0.3", paper=91.56),
            Row(condition="rho-0.4", label="0.4", paper=91.51),
            Row(condition="rho-0.5", label="0.5", paper=90.91),
        ),
    ),
    Group(
        name="rho-fine-tuning",
        title="Tokens in fine-tuning (paper Table 10 right, UCF101)",
        rows=(
            Row(condition="ft-rho-0.15", label="rho 0.15"),
            Row(condition=BASELINE, label="rho 0.3"),
            Row(condition="ft-rho-0.6", label="rho 0.6", paper=91.56),
            Row(condition="ft-all", label="all", paper=89.71),
            Row(condition="ft-random", label="random, 0.3"),
        ),
    ),
    Group(
        name="distance",
        title="Distance between tokens (paper Table 9, HMDB51)",
        rows=(
            Row(condition="cosine", label="negative cosine", paper=33.53),
            Row(condition="cka", label="negative CKA", paper=34.58),
            Row(condition="l1", label="L1", paper=42.22),
            Row(condition=BASELINE, label="L2", paper=42.81),
        ),
    ),
    Group(
        name="alpha",
        title="Frame selection in pre-training (paper Table 13, OSCC)",
        rows=(
            Row(condition=BASELINE, label="none", paper=73.17),
            Row(condition="alpha-1.5", label="alpha 1.5", paper=73.85),
            Row(condition="alpha-2.0", label="alpha 2.0", paper=73.80),
        ),
    ),
    Group(
        name="budget",
        title="Token budget in pre-training (not in the paper)",
        rows=(
            Row(condition=BASELINE, label="a clip's"),
            Row(condition="budget-batch", label="shared by the batch"),
            Row(condition="budget-threshold", label="by a threshold"),
        ),
    ),
)
