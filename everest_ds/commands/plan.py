"""`everest plan RECIPE --gpus N --gpu-memory-gib M`: whether a recipe fits, its memory, and how to run it."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from everest_ds.commands.parsing import C, RecipeArguments, parse_recipe
from everest_ds.config import Config
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.planning.job import PlanJob, PlanOptions
from everest_ds.recipes import find_config


@dataclass(frozen=True, kw_only=True)
class Arguments(RecipeArguments[C]):
    """Estimate the memory of a recipe on given GPUs. Defaults shown are the recipe's."""

    options: Annotated[PlanOptions, tyro.conf.arg(name="")]


def main(words: list[str], world: World) -> PlanJob:
    """Parse and check.

    Raises:
        UserError: There are no GPUs or no memory, or the GPUs do not divide the global batch.
    """
    required = PlanOptions(gpus=tyro.MISSING, gpu_memory_gib=tyro.MISSING)
    arguments = parse_recipe(Arguments, words, "everest plan", world, options=required)
    config, options = arguments.config, arguments.options
    _require_possible(config, options)
    return PlanJob(config=config, options=options, recipe=arguments.recipe, base=find_config(arguments.recipe))


def _require_possible(config: Config, options: PlanOptions) -> None:
    gpus, clips = options.gpus, config.batch.global_size
    if gpus < 1:
        raise UserError(f"--gpus {gpus} must be at least 1")
    if not 0 < options.gpu_memory_gib < float("inf"):
        raise UserError(f"--gpu-memory-gib {options.gpu_memory_gib} must be a number of GiB above 0")
    if clips % gpus:
        below, above = clips // gpus * gpus, (clips // gpus + 1) * gpus
        sizes = f"{below} or {above}" if below else str(above)
        fewer = max(count for count in range(1, gpus) if clips % count == 0)
        raise UserError(
            f"batch.global_size={clips} is not divisible by --gpus {gpus}; use --batch.global-size {sizes}, or "
            f"--gpus {fewer}"
        )
