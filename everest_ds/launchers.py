"""Ends a rank when a launcher above it ends. A leaf.

`deepspeed` has two processes above a rank, torchrun and mpirun one or two. `everest study` and `everest benchmark`
start runs too. A rank that outlived its launcher would continue unseen and keep the port and the run directory.
"""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from everest_ds import interrupts
from everest_ds.processes import children_of, kill_tree, parent_of, started_at, words_of

_PROGRAMS = {
    "deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run",
    "torch.distributed.launch", "mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "orted", "prted",
    "prterun",
}  # fmt: skip
_OURS = {"everest", "everest_ds"}
_COMMANDS_THAT_LAUNCH = {"study", "benchmark"}
# Variables that launchers set in the environment of a rank.
_MARKS = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID")

EXIT_ABANDONED = 129
"""128 plus the number of SIGHUP: the launcher has ended."""
_LOOK_EVERY_S = 0.5
# Ctrl-C in a terminal ends the launcher and reaches the ranks at the same moment: give them time to save.
_SIGNAL_ARRIVES_WITHIN_S = 1.5
_SAVES_WITHIN_S = 60.0


def end_with_launchers(is_first: bool) -> None:
    """End this process and all its descendants when a launcher above it ends.

    A run that was asked to stop may save first. A process without a launcher is not affected.

    Args:
        is_first: Whether this rank prints the message for its machine.
    """
    watched = find_launchers(os.getpid())
    if watched:
        named = {pid: started_at(pid) for pid in watched}
        threading.Thread(target=_watch, args=(named, is_first), name="launchers", daemon=True).start()


def find_launchers(pid: int) -> list[int]:
    """Return the processes above a rank up to its topmost launcher, nearest first; empty without a launcher.

    A launcher that has already ended has the number 0.
    """
    above, current = [], pid
    while current := parent_of(current):
        above.append(current)
    known = [place for place, number in enumerate(above) if _is_launcher(words_of(number))]
    if not known:
        return [0] if any(mark in os.environ for mark in _MARKS) and _was_left(pid) else []
    top = above[known[-1]]
    lost = "deepspeed.launcher.launch" in words_of(top) and os.getsid(top) != top and _was_left(top)
    return [*above[: known[-1] + 1], *([0] if lost else [])]


def _is_launcher(words: Sequence[str]) -> bool:
    if not words:
        return False
    program = Path(words[0]).name
    first = next((word for word in words[1:6] if not word.startswith("-")), "")
    names = {program, Path(first).name} if program.startswith(("python", "bash", "sh")) else {program}
    if not _OURS.isdisjoint(names):
        return not _COMMANDS_THAT_LAUNCH.isdisjoint(words[1:6])
    return not _PROGRAMS.isdisjoint(names)


def _was_left(pid: int) -> bool:
    """Return whether a process has lost its parent: its new parent is in another session.

    torchrun's ranks lead sessions of their own. They have lost their parent if process 1, not a Python, is above.
    """
    try:
        session, above = os.getsid(pid), parent_of(pid)
        if session == pid:
            return above == 1 and not any("python" in word for word in words_of(1)[:1])
        return above != 0 and os.getsid(above) != session
    except OSError:
        return False


def _watch(launchers: dict[int, str | None], is_first: bool) -> None:
    while all(started is not None and started_at(pid) == started for pid, started in launchers.items()):
        time.sleep(_LOOK_EVERY_S)
    time.sleep(_SIGNAL_ARRIVES_WITHIN_S)
    if interrupts.is_requested():
        time.sleep(_SAVES_WITHIN_S)
    elif is_first:
        line = "everest: the launcher has ended, so this process ends too; the same command resumes the run"
        interrupts.write_past_buffers(f"{line} (exit code {EXIT_ABANDONED})\n")
    for child in children_of(os.getpid()):
        kill_tree(child)
    os._exit(EXIT_ABANDONED)
