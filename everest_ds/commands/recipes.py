"""`everest recipes [RECIPE]`: lists the recipes, or shows one as resolved."""

import inspect
from dataclasses import dataclass
from pathlib import Path

from everest_ds.commands.parsing import C, RecipeArguments, parse, parse_recipe
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.planning.job import RecipeJob
from everest_ds.recipes import RECIPES, recipes_of


@dataclass(frozen=True)
class NoArguments:
    """List the recipes. `everest recipes RECIPE --help` has the options for one."""


@dataclass(frozen=True, kw_only=True)
class Arguments(RecipeArguments[C]):
    """Show the resolved configuration of a recipe."""

    gpus: int = 8
    """Number of processes for the batch arithmetic."""
    ds_config: Path | None = None
    """DeepSpeed file. Default: plain ZeRO-2."""


def main(words: list[str], world: World) -> int | RecipeJob:
    """List the recipes with the first line of their docstrings, or return the job that shows one."""
    if words and not words[0].startswith("-"):
        arguments = parse_recipe(Arguments, words, "everest recipes", world)
        if arguments.gpus < 1:
            raise UserError(f"--gpus {arguments.gpus} must be at least 1")
        config = arguments.config
        recipe = RECIPES.get(config.recipe)
        document = inspect.getdoc(recipe) if recipe else None
        return RecipeJob(
            config=config,
            document=document or f"{config.recipe}: not a recipe of this version",
            gpus=arguments.gpus,
            ds_config=arguments.ds_config,
        )
    parse(NoArguments, words, "everest recipes [RECIPE]", world)
    for name in [*recipes_of("pretrain"), *recipes_of("finetune")]:
        print(f"{name:<16} {(RECIPES[name].__doc__ or '').splitlines()[0]}")
    return 0
