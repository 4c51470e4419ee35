"""The command line: `everest COMMAND ...`.

This module imports very little, so that Ctrl-C works soon after the start of a process.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from everest_ds.cli.table import COMMANDS, interrupted

__all__ = ["COMMANDS", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        argv: The words of the command line. Default: those of this process. Only then are signals handled, from
            here on and also during imports.
    """
    if argv is None:
        signal.signal(signal.SIGINT, _leave)
        from everest_ds.schedulers import adopt

        adopt(os.environ)  # before anything reads the rank
        from everest_ds import interrupts
        from everest_ds.distributed import World, speaks_first
        from everest_ds.launchers import end_with_launchers

        line, world = interrupted(sys.argv[1:]), World.from_environment()
        interrupts.begin(lambda: _write(line) if speaks_first(line, world) else None)
        end_with_launchers(is_first=world.local_rank == 0)
    from everest_ds.cli import dispatch

    code = dispatch.main(argv)
    if argv is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python removes its own handlers while it ends
    return code


def _leave(signum: int, frame: FrameType | None) -> None:
    """End the process at once. Nothing can be imported here, because an import may be in progress."""
    if os.environ.get("RANK", "0") == "0":
        _write(interrupted(sys.argv[1:]))
    os._exit(128 + signum)


def _write(line: str) -> None:
    """Write a line to stderr without Python's buffers, which may be locked."""
    streams = sys.modules.get("everest_ds.console.streams")  # stderr is redirected only after this import
    os.write(getattr(streams, "stderr_fd", 2), f"{line}\n".encode())
