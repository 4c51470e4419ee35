"""`everest study DIR`: the paper's comparisons in miniature."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds.commands.parsing import parse
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.study.conditions import StudyJob, StudyOptions
from everest_ds.study.worlds.drawing import require_drawing


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare selections, ratios, distances and budgets on small videos, over seeds. The same command resumes."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder for videos, runs and results."""
    options: Annotated[StudyOptions, tyro.conf.arg(name="")] = field(default_factory=StudyOptions)


def main(words: list[str], world: World) -> StudyJob:
    """Parse, and refuse a world that cannot be drawn here."""
    if world.size > 1:
        raise UserError("everest study starts its own runs; start it without a launcher")
    arguments = parse(Arguments, words, "everest study", world)
    if arguments.options.world == "physics":
        require_drawing()
    return StudyJob(folder=arguments.folder, options=arguments.options)
