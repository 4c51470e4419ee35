"""`everest convert`: writes weights of a run or of another project in another layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds.commands.parsing import parse
from everest_ds.distributed import World
from everest_ds.inference.job import ConversionJob, ConvertOptions
from everest_ds.recipes import find_config


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write weights in another layout, and print what was read and which name became which."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """A run directory (its best checkpoint, or its newest if none was scored), a checkpoint, an official .pth file,
    a Hugging Face folder, or a file of this command."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """File or folder to write; it must not exist."""
    options: Annotated[ConvertOptions, tyro.conf.arg(name="")]


def main(words: list[str], world: World) -> ConversionJob:
    """Parse, and find the recipe."""
    arguments = parse(Arguments, words, "everest convert", world)
    options = arguments.options
    recipe = find_config(options.recipe) if options.recipe else None
    return ConversionJob(source=arguments.source, target=arguments.target, options=options, recipe=recipe)
