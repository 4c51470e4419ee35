"""`everest demo-data DIR`: make the demo dataset, with progress."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds.commands.parsing import parse
from everest_ds.data.demo import DemoConfig, write_demo_data
from everest_ds.distributed import World


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make the demo dataset."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Where to write it."""
    demo: Annotated[DemoConfig, tyro.conf.arg(name="")] = field(default_factory=DemoConfig)


def main(words: list[str], world: World) -> int:
    """Parse, and write the dataset."""
    arguments = parse(Arguments, words, "everest demo-data", world)
    demo_data(arguments.folder, arguments.demo)
    return 0


def demo_data(folder: Path, config: DemoConfig) -> None:
    """Write the dataset and say what is there."""
    started = time.perf_counter()

    def show(done: int, total: int) -> None:
        if done % 100 == 0 or done == total:
            left_s = (time.perf_counter() - started) / done * (total - done)
            print(f"{done}/{total} videos, {left_s:.0f} s left", flush=True)

    lists = write_demo_data(folder, config, on_progress=show)
    names = ", ".join(str(path) for path in lists)
    print(f"{len(config.class_names)} classes in {folder}: {names}")
