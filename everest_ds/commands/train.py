"""`everest pretrain` and `everest finetune`: train a recipe, or resume a run."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from everest_ds.commands.parsing import C, RecipeArguments, parse_recipe
from everest_ds.data.lists.run_lists import read_lists
from everest_ds.data.readers.choice import choose_reader
from everest_ds.distributed import World
from everest_ds.train.checkpoints.run_dir import find_resume, require_same_classes
from everest_ds.train.job import LaunchOptions, TrainingJob
from everest_ds.train.trackers.group import require_trackers


@dataclass(frozen=True, kw_only=True)
class Arguments(RecipeArguments[C]):
    """Train a recipe. Defaults shown are the recipe's."""

    options: Annotated[LaunchOptions, tyro.conf.arg(name="")] = field(default_factory=LaunchOptions)


def pretrain(words: list[str], world: World) -> TrainingJob:
    """Parse `everest pretrain`."""
    return check(parse_recipe(Arguments, words, "everest pretrain", world, task="pretrain"), world)


def finetune(words: list[str], world: World) -> TrainingJob:
    """Parse `everest finetune`."""
    return check(parse_recipe(Arguments, words, "everest finetune", world, task="finetune"), world)


def check(arguments: Arguments[C], world: World) -> TrainingJob:
    """Do all checks of a run that need no torch.

    Raises:
        UserError: A list, the batch, the reader or the run directory is wrong, the run directory has other class
            names, or a tracker is not installed.
    """
    lists = read_lists(arguments.config, world)
    lists.config.batch.accumulation_steps(world.size)
    choose_reader(lists.config.data.reader)
    require_trackers(lists.config.run.log_to)
    options = arguments.options
    resume = find_resume(options.out, lists.config, options.resume)
    if lists.classes is not None and lists.classes.names is not None:
        require_same_classes(resume, lists.classes.names)
    return TrainingJob(lists=lists, resume=resume, options=options)
