"""The command line: `everest COMMAND ...`.

This module imports next to nothing, so that a process answers Ctrl-C soon after it has begun.
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
        argv: The words; without them those of this process, which then belongs to the command: it answers Ctrl-C
            from here on, also while modules are imported.
    """
    if argv is None:
        signal.signal(signal.SIGINT, _leave)
        from everest_ds.schedulers import adopt

        adopt(os.environ)  # before anything asks who this process is
        from everest_ds import interrupts
        from everest_ds.distributed import World, speaks_first
        from everest_ds.launchers import end_with_launchers

        line, world = interrupted(sys.argv[1:]), World.from_environment()
        interrupts.begin(lambda: _write(line) if speaks_first(line, world) else None)
        end_with_launchers(is_first=world.local_rank == 0)
    from everest_ds.cli import dispatch

    code = dispatch.main(argv)
    if argv is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python takes its own handlers away while it ends
    return code


def _leave(signum: int, frame: FrameType | None) -> None:
    """Leave at once; nothing can be imported here, as an import may be under way."""
    if os.environ.get("RANK", "0") == "0":
        _write(interrupted(sys.argv[1:]))
    os._exit(128 + signum)


def _write(line: str) -> None:
    """Write a line to stderr, past Python's own buffers: they may be in use."""
    streams = sys.modules.get("everest_ds.console.streams")  # set aside only once that is imported
    os.write(getattr(streams, "stderr_fd", 2), f"{line}\n".encode())
