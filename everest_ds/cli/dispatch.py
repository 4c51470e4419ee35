"""The command line: `everest COMMAND ...`. Parses, calls a module of `everest_ds.commands`, no logic of its own.

Exit codes: 0 done; 1 a check found a fault (`everest doctor`, `everest plan`) or we failed; 2 a fault of the
user's, with one message and no traceback; 75 a signal stopped a run, all saved, and the same command resumes it;
130 Ctrl-C ended a command, with one line and no traceback.
Modules are imported when their command runs.
"""

import errno
import io
import os
import sys
from collections.abc import Sequence

from everest_ds import __version__, interrupts
from everest_ds.cli import benchmark_handlers, data_handlers, handlers
from everest_ds.cli.parsing import leave, say
from everest_ds.cli.table import COMMANDS, EXIT_INTERRUPTED, interrupted
from everest_ds.distributed import World
from everest_ds.errors import UserError, nearest_hint

# What launchers add to the words of each process unless they are told not to.
LOCAL_RANK_FLAGS = ("--local_rank", "--local-rank")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    world = World.from_environment()
    try:
        return _run(words, world)
    except KeyboardInterrupt:
        say(f"{interrupted(words)}\n", world)
        return leave(EXIT_INTERRUPTED)
    finally:
        interrupts.finish()


def _run(words: list[str], world: World) -> int:
    try:
        return _interruptible(words, world)
    except UserError as error:
        say(f"everest: error: {error}\n", world)
        return leave(2)
    except BrokenPipeError:  # the reader of a listing, `head` for instance, has seen enough
        if words[0] in ("pretrain", "finetune"):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return leave(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        say(f"everest: error: {error.strerror}: {error.filename or 'see the run directory'}; make room\n", world)
        return leave(2)


def _interruptible(words: list[str], world: World) -> int:
    """Dispatch, with what Ctrl-C does meanwhile: a launch leaves at once, a process by itself cleans up before."""
    if world.size == 1:
        interrupts.unwind()
    try:
        return _dispatch(words, world)
    except Exception as error:
        if interrupts.was_raised():  # what fails after Ctrl-C fails because of it
            raise KeyboardInterrupt from error
        raise


def _dispatch(words: list[str], world: World) -> int:
    if not words or words[0] in ("-h", "--help"):
        say(_usage(), world, to_stdout=True)
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    if any(word.partition("=")[0] in LOCAL_RANK_FLAGS for word in words):
        # The same text on every rank, so that a launch says it once.
        raise UserError(
            "the launcher passed --local_rank, which everest reads from the environment instead; start with "
            "`deepspeed --no_local_rank --module everest_ds ...` (or torchrun)"
        )
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest_hint(command, COMMANDS)}")
    run = {
        "doctor": handlers.doctor,
        "demo-data": data_handlers.demo_data,
        "index": data_handlers.index,
        "check-data": data_handlers.check_data,
        "prepare": data_handlers.prepare,
        "recipes": handlers.recipes,
        "plan": handlers.plan,
        "pretrain": handlers.pretrain,
        "finetune": handlers.finetune,
        "evaluate": handlers.evaluate,
        "predict": handlers.predict,
        "convert": handlers.convert,
        "study": handlers.study,
        "benchmark": benchmark_handlers.benchmark,
    }
    return run[command](rest, world)


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    return f"usage: everest COMMAND ...\n\n{rows}\n\n`everest COMMAND --help` shows its options.\n"
