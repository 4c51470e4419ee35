"""`everest show`: draws the kept tokens of videos."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds.commands.parsing import parse
from everest_ds.commands.weights.predict import rows_of
from everest_ds.config import FinetuneConfig
from everest_ds.distributed import World
from everest_ds.errors import UserError, nearest_hint
from everest_ds.inference.job import ShowJob, ShowOptions
from everest_ds.recipes import RECIPES, find_config
from everest_ds.train.checkpoints.origin import Origin, locate


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw the clip in the middle of each video, the importance of its tokens, the kept tokens, and, with weights
    of pre-training, the reconstruction.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|WEIGHTS|RECIPE")]
    """A run directory, a checkpoint, or weights in any layout; for a fresh embedding, a recipe or config.json."""
    videos: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="VIDEO...")]
    """Video files, or folders to search for them; optional with --list."""
    options: Annotated[ShowOptions, tyro.conf.arg(name="")]


def main(words: list[str], world: World) -> ShowJob:
    """Parse and check."""
    return check(parse(Arguments, words, "everest show", world))


def check(arguments: Arguments) -> ShowJob:
    """Find videos and weights.

    Raises:
        UserError: There are no videos, or the source is unknown.
    """
    options = arguments.options
    rows = rows_of(arguments.videos, options.list, "show")
    recipe = find_config(options.recipe) if options.recipe else None
    source = arguments.source
    origin: Origin | None = None
    if Path(source).exists() and not source.endswith(".json"):
        origin = locate(Path(source))
        if recipe is not None and isinstance(origin.config, FinetuneConfig):
            raise UserError(f"--recipe {options.recipe} has no effect: {source} has its own settings; remove it")
    elif recipe is not None:
        raise UserError(f"--recipe {options.recipe} has no effect: {source} is not a file of weights; remove it")
    elif source in RECIPES or source.endswith(".json"):
        recipe = find_config(source)
    else:
        raise UserError(
            f"{source} is neither a path nor a recipe{nearest_hint(source, RECIPES)}; expected a run directory, a "
            "checkpoint, weights, or the name of a recipe"
        )
    return ShowJob(origin=origin, recipe=recipe, options=options, rows=rows)
