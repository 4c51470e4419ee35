"""What is to be planned, known before torch is imported."""

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
    """Plan with this file only, instead of the ways of sharding that come with the project."""
    precision: PrecisionName = "auto"
    """Of the run; auto: as the DeepSpeed files say, else bf16."""
    json: bool = False
    """One JSON object, in bytes, instead of a table in GiB."""


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """A plan that is wanted.

    Attributes:
        config: The run, with the flags of the command line.
        options: What to plan for.
        recipe: The recipe's name, or the path of a run's config.json, as given.
        base: What that names, without the flags.
    """

    config: Config
    options: PlanOptions
    recipe: str
    base: Config


@dataclass(frozen=True, kw_only=True)
class RecipeJob:
    """A recipe that is to be shown.

    Attributes:
        config: It, with the flags of the command line.
        document: What it says of itself.
        gpus: Processes to do the batch arithmetic for.
        ds_config: File of ds_configs/; plain ZeRO-2 without one.
    """

    config: Config
    document: str
    gpus: int
    ds_config: Path | None
