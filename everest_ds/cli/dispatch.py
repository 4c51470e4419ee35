"""Calls the command that the words of a command line name, and turns errors into messages and exit codes.

Exit codes: 0 done; 1 a check found a fault (`everest doctor`, `everest plan`), or a bug; 2 a fault in the user's
input, with one message and no traceback; 62 a run hung and ended itself; 75 a signal stopped a run after a save;
130 Ctrl-C ended a command, with one line and no traceback. After 62 and 75 the same command resumes the run.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Mapping, Sequence

from everest_ds import __version__, distributed, interrupts
from everest_ds.cli import completion
from everest_ds.cli.table import COMMANDS, EXIT_INTERRUPTED, Command, interrupted
from everest_ds.commands.parsing import say, usage
from everest_ds.console import messages, streams
from everest_ds.distributed import World
from everest_ds.errors import UserError, escaped, nearest_hint
from everest_ds.train.signals import EXIT_STOPPED

# Flags that launchers add to the words of each process by default.
LOCAL_RANK_FLAGS = ("--local_rank", "--local-rank")
_QUIET, _VERBOSE = ("-q", "--quiet"), ("-v", "--verbose")
LOADING = "loading torch and DeepSpeed (usually 3 to 15 s)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    words = _take_verbosity(list(sys.argv[1:] if argv is None else argv))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be invalid text
    world = World.from_environment()
    try:
        return _run(words, world)
    except KeyboardInterrupt:
        say(f"{interrupted(words)}\n", world)
        return _leave(EXIT_INTERRUPTED)
    finally:
        interrupts.finish()


def _run(words: list[str], world: World) -> int:
    try:
        return _interruptible(words, world)
    except UserError as error:
        lines = "\n".join(map(escaped, str(error).split("\n")))  # it may contain names from untrusted files
        say(f"everest: error: {lines}\n", world)
        return _leave(2)
    except BrokenPipeError:  # the reader has ended, for example `head`
        if words[0] in ("pretrain", "finetune"):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        say(f"everest: error: {error.strerror}: {error.filename or 'see the run directory'}; free space\n", world)
        return _leave(2)


def _interruptible(words: list[str], world: World) -> int:
    """Dispatch, and set the effect of Ctrl-C: a launch ends at once, a single process cleans up first."""
    if world.size == 1:
        interrupts.unwind()
    try:
        return _dispatch(words, world)
    except Exception as error:
        if interrupts.was_raised():  # errors after Ctrl-C are consequences of it
            raise KeyboardInterrupt from error
        raise


def _dispatch(words: list[str], world: World) -> int:
    if not words or words[0] in ("-h", "--help"):
        return _show_usage("everest COMMAND", COMMANDS, world)
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0].partition("=")[0] == completion.FLAG:
        shell = words[0].partition("=")[2] or " ".join(words[1:])
        say(completion.completion_script(shell), world, to_stdout=True)
        return 0
    if any(word.partition("=")[0] in LOCAL_RANK_FLAGS for word in words):
        # The text must be the same on every rank, so that a launch prints it once.
        raise UserError(
            "the launcher passed --local_rank, which everest reads from the environment instead; start with "
            "`deepspeed --no_local_rank --module everest_ds ...` (or torchrun)"
        )
    name, *rest = words
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest_hint(name, COMMANDS)}")
    command = COMMANDS[name]
    if command.parts:
        part = rest[0] if rest else ""
        if part in ("-h", "--help"):
            return _show_usage(f"everest {name} NAME", command.parts, world)
        if part not in command.parts:
            raise UserError(f"unknown {name} {part!r}{nearest_hint(part, command.parts)}")
        command, rest = command.parts[part], rest[1:]
    return _call(command, rest, world)


def _call(command: Command, words: list[str], world: World) -> int:
    """Run a command's entry, and, if that returns a job, its work."""
    job = command.load_entry()(words, world)
    if isinstance(job, int):
        return job
    if world.is_main and not messages.is_quiet():
        print(LOADING, file=sys.stderr, flush=True)
    keeps_logs = command.keeps_logs and not messages.is_verbose()
    with streams.set_aside(speaks=world.is_main) if keeps_logs else contextlib.nullcontext():
        messages.send_libraries_to(sys.__stderr__)
        with streams.quietly():
            distributed.select_accelerator()  # before DeepSpeed is imported
            work = command.load_work()
        code = work(job, world)
    # The processes of a launch skip Python's clean-up. So does a stopped run: a scheduler waits for its end.
    return _leave(code, at_once=world.size > 1 or code == EXIT_STOPPED)


def _take_verbosity(words: list[str]) -> list[str]:
    """Set the verbosity, and return the other words."""
    louder, quieter = (sum(word in names for word in words) for names in (_VERBOSE, _QUIET))
    messages.set_verbosity(louder - quieter)
    return [word for word in words if word not in (*_VERBOSE, *_QUIET)]


def _show_usage(prog: str, commands: Mapping[str, Command], world: World) -> int:
    say(usage(prog, "...", {name: command.purpose for name, command in commands.items()}), world, to_stdout=True)
    return 0


def _leave(code: int, *, at_once: bool = False) -> int:
    """Return the exit code, or exit at once if there was a process group.

    gloo sometimes aborts at exit (code -6) even after the group was left: in one launch of some hundreds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    torch = sys.modules.get("torch")
    if at_once or (torch is not None and torch.distributed.is_initialized()):
        os._exit(code)
    return code
