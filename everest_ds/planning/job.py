"""The jobs of `everest plan` and `everest recipes`, complete before torch is imported."""

from dataclasses import dataclass
from pathlib import Path

from everest_ds.config import Config
from everest_ds.train.precision import PrecisionName


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to plan for."""

    gpus: int
    """GPUs of the run, one process each."""
    gpu_memory_gib: float
    """Memory of one GPU in GiB."""
    ds_config: Path | None = None
    """Plan with this file only, instead of all files of ds_configs."""
    precision: PrecisionName = "auto"
    """Precision of the run; auto takes it from the DeepSpeed files, else bf16."""
    json: bool = False
    """Print one JSON object, in bytes, instead of a table in GiB."""


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """A plan to make.

    Attributes:
        config: The run, with the flags of the command line.
        options: What to plan for.
        recipe: The recipe's name, or the path of a run's config.json, as given.
        base: The configuration of that recipe or path, without the flags.
    """

    config: Config
    options: PlanOptions
    recipe: str
    base: Config


@dataclass(frozen=True, kw_only=True)
class RecipeJob:
    """A recipe to show.

    Attributes:
        config: The recipe, with the flags of the command line.
        document: The recipe's docstring.
        gpus: Number of processes for the batch arithmetic.
        ds_config: A file of ds_configs/; plain ZeRO-2 if None.
    """

    config: Config
    document: str
    gpus: int
    ds_config: Path | None
