"""Processes of this machine: find, kill, and end them with their parent. A leaf.

`python -m everest_ds.processes MODULE ARGUMENTS` runs a module in a process that the kernel kills when its parent
ends, for whatever reason. The same holds for processes that the module forks.
"""

import contextlib
import ctypes
import os
import runpy
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def started_at(pid: int) -> str | None:
    """Return when a process began, in ticks since the machine's start; None if it does not run.

    Number and start together identify a process, because the system reuses numbers.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def seconds_since_start() -> float:
    """Return how long this process has run, to a hundredth of a second; 0 if the system does not tell."""
    try:
        ticks = int(started_at(os.getpid()) or "")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (ValueError, OSError, AttributeError):
        return 0.0


def parent_of(pid: int) -> int:
    """Return the number of the parent process; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def words_of(pid: int) -> list[str]:
    """Return the command line of a process; empty if it does not run or has none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants. Each is stopped first, so that it cannot start new ones."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    for child in children_of(pid):
        kill_tree(child)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """Return the numbers of a process's running children."""
    children: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, listed.read_text().split())
    return children


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends, even inside a hanging C call."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_memory() -> int | None:
    """Return about how many bytes of memory are free on this machine and in this container; None if unknown."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
        with contextlib.suppress(OSError, ValueError, KeyError):  # no limit, or another kind of container
            group = Path("/sys/fs/cgroup")
            used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            taken = int((group / "memory.current").read_text()) - int(used["inactive_file"])
            free = min(free, int((group / "memory.max").read_text()) - taken)
        return max(free, 0)
    return None


def name_this(name: str) -> None:
    """Set the name that ps and top show for the calling thread, at most 15 letters."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def _run_module(name: str) -> None:
    parent = os.getppid()
    end_with_parent()
    os.register_at_fork(after_in_child=end_with_parent)
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(1)
    sys.argv = sys.argv[1:]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run_module(sys.argv[1])
