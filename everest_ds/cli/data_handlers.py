"""The commands about data, one function each, as in `cli.handlers`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds.cli.parsing import parse, say
from everest_ds.distributed import World
from everest_ds.errors import UserError, nearest_hint


def demo_data(rest: list[str], world: World) -> int:
    """Make the demo dataset."""
    from everest_ds.data.demo import DemoConfig

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Make the demo dataset."""

        folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
        """Where to write it."""
        demo: Annotated[DemoConfig, tyro.conf.arg(name="")] = field(default_factory=DemoConfig)

    arguments = parse(Arguments, rest, "everest demo-data", world)
    from everest_ds.commands import demo_data as command

    command.demo_data(arguments.folder, arguments.demo)
    return 0


def check_data(rest: list[str], world: World) -> int:
    """Check the videos of a list."""
    from everest_ds.commands import check_data as command

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Open and sample every video of a list, each in a process that can be killed; go on where it was.

        Writes report.csv, clean.csv and quarantine.csv.
        """

        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="LIST")]
        """List of videos."""
        options: Annotated[command.CheckOptions, tyro.conf.arg(name="")] = field(
            default_factory=command.CheckOptions
        )

    arguments = parse(Arguments, rest, "everest check-data", world)
    return command.check_data(arguments.source, arguments.options)


def prepare(rest: list[str], world: World) -> int:
    """Re-encode the videos of lists."""
    from everest_ds.commands import prepare as command

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Re-encode videos so that they are quick to read, each in a process that can be killed; go on where it is.

        Writes videos, a list for each list, manifest.jsonl and summary.json. Originals are only read.
        """

        sources: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="LIST...")]
        """Lists of videos, each of another name."""
        options: Annotated[command.PrepareOptions, tyro.conf.arg(name="")]

    if world.size > 1:
        raise UserError("everest prepare runs in one process and starts its own; start it without a launcher")
    arguments = parse(Arguments, rest, "everest prepare", world)
    if not arguments.sources:
        raise UserError("prepare which lists? expected `everest prepare LIST... --out DIR`")
    return command.prepare(arguments.sources, arguments.options)


def index(rest: list[str], world: World) -> int:
    """Turn a public dataset's layout into lists."""
    from everest_ds.commands import index as command
    from everest_ds.data.importers.registry import IMPORTERS

    dataset = rest[0] if rest else ""
    if dataset in ("-h", "--help"):
        rows = "\n".join(f"  {name:<9} {importer.layout}" for name, importer in IMPORTERS.items())
        usage = (
            f"usage: everest index DATASET SRC --out DIR\n\n{rows}\n\n`everest index DATASET --help` shows more.\n"
        )
        say(usage, world, to_stdout=True)
        return 0
    if dataset not in IMPORTERS:
        raise UserError(f"index which dataset? got {dataset!r}{nearest_hint(dataset, IMPORTERS)}")
    kind = IMPORTERS[dataset].options

    @dataclass(frozen=True, kw_only=True)
    class Arguments:
        """Write train.csv, val.csv, test.csv (what the dataset has), classes.txt and summary.json."""

        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
        """Folder of the dataset as downloaded; nothing is written there."""
        out: Path
        """Folder for the lists, made where there is none; only files of an earlier index are replaced."""
        options: Annotated[kind, tyro.conf.arg(name="")] = field(default_factory=kind)  # type: ignore[valid-type]

    if world.size > 1:
        raise UserError("everest index runs in one process; start it without a launcher")
    arguments = parse(Arguments, rest[1:], f"everest index {dataset}", world)
    command.index(dataset, arguments.source, arguments.out, arguments.options)
    return 0
