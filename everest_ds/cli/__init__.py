"""The command line: `everest COMMAND ...`."""

import os
import sys
from collections.abc import Sequence

from everest_ds import interrupts
from everest_ds.cli.table import COMMANDS, interrupted
from everest_ds.distributed import World, speaks_first

__all__ = ["COMMANDS", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        argv: The words; without them those of this process, which then belongs to the command: it answers Ctrl-C
            from here on, also while modules are imported.
    """
    if argv is None:
        interrupts.begin(lambda: _say(interrupted(sys.argv[1:])))
    from everest_ds.cli import dispatch

    return dispatch.main(argv)


def _say(line: str) -> None:
    """Write a line to stderr, past Python's own buffers, and once for all processes of a launch."""
    world = World.from_environment()
    if speaks_first(line, world):
        os.write(2, f"{line}\n".encode())
