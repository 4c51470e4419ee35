"""What is to be studied, known before torch is imported."""

from dataclasses import dataclass
from pathlib import Path

from everest_ds.errors import UserError, nearest_hint
from everest_ds.study.conditions import CONDITIONS, Condition


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """How much is studied, and how many runs go at a time."""

    quick: bool = False
    """The main conditions alone, half the steps, one seed unless --seeds names others."""
    seeds: tuple[int, ...] | None = None
    """Seeds of weights, order, selection and labelled videos; 0 1 2 without this, 0 in a quick study."""
    jobs: int | None = None
    """Runs at a time; without this, one a CPU core, or four a GPU."""
    only: tuple[str, ...] = ()
    """Conditions to run, by name; all without this."""
    shake: int = 0
    """Pixels by which the camera shakes."""

    def __post_init__(self) -> None:
        """Check each field by itself."""
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"--jobs {self.jobs} must be at least 1")
        if self.seeds is not None and len(set(self.seeds)) < max(len(self.seeds), 1):
            raise UserError(f"--seeds {self.seeds} must be one or more different numbers")
        known = [condition.name for condition in CONDITIONS]
        for name in self.only:
            if name not in known:
                raise UserError(f"--only {name}: no such condition{nearest_hint(name, known)}")

    @property
    def conditions(self) -> list[Condition]:
        """What is compared."""
        if self.only:
            return [condition for condition in CONDITIONS if condition.name in self.only]
        return [condition for condition in CONDITIONS if condition.is_main or not self.quick]


@dataclass(frozen=True, kw_only=True)
class StudyJob:
    """A study that is wanted.

    Attributes:
        folder: Where everything goes.
        options: What is compared, and how many runs go at a time.
    """

    folder: Path
    options: StudyOptions
