"""`everest prepare LIST... --out DIR`: videos re-encoded for training, and the lists of them.

Every video is read, encoded and verified in a process that can be killed. Originals are only read. DIR holds

    videos/FOLDER/STEM-HASH.mp4   a file for each video, or window of it, that the lists name
    manifest.jsonl                one line a file, as they come: a later call continues from them
    summary.json                  how it was made, what is lost, bytes and faults of each list
    LIST, classes.txt             a list for each list, in its order, and the names of the classes
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds.commands.parsing import parse
from everest_ds.data.curation.preparation import Preparation, PrepareOptions, start_preparation
from everest_ds.distributed import World
from everest_ds.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Re-encode videos so that they are quick to read, each in a process that can be killed; continue where it was.

    Writes videos, a list for each list, manifest.jsonl and summary.json. Originals are only read.
    """

    sources: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="LIST...")]
    """Lists of videos, each of another name."""
    options: Annotated[PrepareOptions, tyro.conf.arg(name="")]


def main(words: list[str], world: World) -> Preparation:
    """Parse, and read the lists."""
    if world.size > 1:
        raise UserError("everest prepare runs in one process and starts its own; start it without a launcher")
    arguments = parse(Arguments, words, "everest prepare", world)
    if not arguments.sources:
        raise UserError("prepare which lists? expected `everest prepare LIST... --out DIR`")
    return start_preparation(arguments.sources, arguments.options)
