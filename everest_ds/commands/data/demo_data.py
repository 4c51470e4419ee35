"""`everest demo-data DIR`: makes the demo dataset."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds.commands.parsing import parse
from everest_ds.console.messages import say
from everest_ds.data.demo import DemoConfig, write_demo_data
from everest_ds.distributed import World


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make the demo dataset."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder for the dataset."""
    demo: Annotated[DemoConfig, tyro.conf.arg(name="")] = field(default_factory=DemoConfig)


def main(words: list[str], world: World) -> int:
    """Parse, write the dataset, and print its lists."""
    arguments = parse(Arguments, words, "everest demo-data", world)
    lists = write_demo_data(arguments.folder, arguments.demo)
    names = ", ".join(str(path) for path in lists)
    say(f"{len(arguments.demo.class_names)} classes in {arguments.folder}: {names}")
    return 0
