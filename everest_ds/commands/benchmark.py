"""`everest benchmark NAME`: costs of clips, steps and models."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from everest_ds.benchmark.options import (
    DataBenchmarkOptions,
    DataJob,
    FlopsOptions,
    StepJob,
    StepOptions,
    check_data,
    check_step,
)
from everest_ds.commands.parsing import C, RecipeArguments, parse, parse_recipe
from everest_ds.distributed import World
from everest_ds.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataArguments(RecipeArguments[C]):
    """Measure the cost of a recipe's clips on this machine. Defaults shown are the recipe's."""

    options: Annotated[DataBenchmarkOptions, tyro.conf.arg(name="")] = field(default_factory=DataBenchmarkOptions)


@dataclass(frozen=True, kw_only=True)
class StepArguments(RecipeArguments[C]):
    """Measure training steps of a recipe on synthetic clips. Defaults shown are the recipe's."""

    options: Annotated[StepOptions, tyro.conf.arg(name="")] = field(default_factory=StepOptions)


def flops(words: list[str], world: World) -> FlopsOptions:
    """Parse `everest benchmark flops`."""
    return parse(FlopsOptions, words, "everest benchmark flops", world)


def data(words: list[str], world: World) -> DataJob:
    """Parse `everest benchmark data`, and read the lists."""
    if world.size > 1:
        raise UserError("everest benchmark data starts its own loader workers; start it without a launcher")
    arguments = parse_recipe(DataArguments, words, "everest benchmark data", world)
    return check_data(arguments.config, arguments.options)


def step(words: list[str], world: World) -> StepJob:
    """Parse `everest benchmark step`, and refuse options that cannot be combined."""
    arguments = parse_recipe(StepArguments, words, "everest benchmark step", world)
    return check_step(arguments.config, arguments.options, world)
