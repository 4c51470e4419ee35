"""`everest prepare LIST... --out DIR`: re-encodes videos for training, and writes lists of them.

Every video is read, encoded and verified in a worker process, which is killed if it hangs. Originals are only read.
DIR contains

    videos/FOLDER/STEM-HASH.mp4   a file for each video, or window of a video, that the lists name
    manifest.jsonl                one line for each file, in order of completion: a later call continues from them
    summary.json                  settings, losses, bytes and faults of each list
    LIST, classes.txt             a new list for each list, in the same order, and the names of the classes
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
    """Re-encode videos so that they are quick to read. The same command continues after an interruption.

    Writes videos, a new list for each list, manifest.jsonl and summary.json. Originals are only read.
    """

    sources: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="LIST...")]
    """Lists of videos with different names."""
    options: Annotated[PrepareOptions, tyro.conf.arg(name="")]


def main(words: list[str], world: World) -> Preparation:
    """Parse, and read the lists."""
    if world.size > 1:
        raise UserError("everest prepare starts its own workers; start it without a launcher")
    arguments = parse(Arguments, words, "everest prepare", world)
    if not arguments.sources:
        raise UserError("there is no list to prepare; expected `everest prepare LIST... --out DIR`")
    return start_preparation(arguments.sources, arguments.options)
