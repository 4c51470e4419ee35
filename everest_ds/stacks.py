"""Stacks of hanging processes. The signal's handler is written in C and needs no lock of Python's. A leaf.

A rank that receives `HANG_SIGNAL` writes the stacks of all its threads to a file and ends, even if a C call holds
Python's lock, or if it was stopped and is continued. A process that reads videos writes its stacks to memory and
continues. The signal's number is also the exit code of a run that hung: a handler in C that ends the process
receives no other number.
"""

import contextlib
import ctypes
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TextIO

from everest_ds.processes import children_of, words_of

EXIT_HUNG = 62
"""The exit code of a run that hung; as an error of the system it reads "timer expired"."""
HANG_SIGNAL = EXIT_HUNG
_MEMORY = "everest-stacks"
_ANSWERS_WITHIN_S = 0.5
_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk", "R": "running", "S": "sleeping"}
# A thread waits for other ranks if its innermost frame is in `_COLLECTIVES`, or is one of `_WAITS` in `_LIBRARIES`.
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_LIBRARIES = ("/torch/", "/deepspeed/")
_WAITS = ("wait", "synchronize", "barrier")


def end_with_stacks(file: TextIO) -> None:
    """At the signal, write the stacks of this process to an open file and end it."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(HANG_SIGNAL, ctypes.cast(libc._exit, ctypes.c_void_p))
    faulthandler.register(HANG_SIGNAL, file=file, all_threads=True, chain=True)


def forget() -> None:
    """At the signal, end this process without writing stacks."""
    faulthandler.unregister(HANG_SIGNAL)


def keep_stacks_ready() -> None:
    """At the signal, write the stacks of this process to memory that other processes can read, and continue."""
    faulthandler.register(HANG_SIGNAL, file=os.memfd_create(_MEMORY), all_threads=True)


def of_children(pid: int) -> str:
    """Return a text about a process's descendants: number, state, command line, and stacks if they answer."""
    parts = []
    for child in children_of(pid):
        parts.append(f"--- process {child}, {state_of(child)}: {' '.join(words_of(child))[:200]}\n{_ask(child)}")
        parts.append(of_children(child))
    return "".join(parts)


def state_of(pid: int) -> str:
    """Return the state of a process of this machine, in words."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return "ended"
    return _STATES.get(letter, "ended")


def _ask(pid: int) -> str:
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if _MEMORY in os.readlink(link):
                before = link.stat().st_size
                os.kill(pid, HANG_SIGNAL)
                until = time.monotonic() + _ANSWERS_WITHIN_S
                while link.stat().st_size == before and time.monotonic() < until:
                    time.sleep(_ANSWERS_WITHIN_S / 10)
                return link.read_bytes()[before:].decode(errors="replace")
    return ""


def describe_call() -> tuple[str, bool]:
    """Return where this process is, by its Python stacks, and whether it waits for other ranks there.

    If no thread waits, the place is that of the main thread.
    """
    frames = sys._current_frames()
    main = threading.main_thread().ident
    for ident, frame in sorted(frames.items(), key=lambda item: item[0] != main):
        if ident != threading.get_ident() and (waits_in := _find_wait(frame)):
            return waits_in, True
    return _describe(frames.get(main or 0)), False


def _find_wait(frame: FrameType) -> str | None:
    """Return the collective in which a thread waits, and its caller; None if it does not wait."""
    current: FrameType | None = frame
    name = ""
    while current is not None:
        code = current.f_code
        in_collective = any(part in code.co_filename for part in _COLLECTIVES)
        in_wait = not name and code.co_name in _WAITS and any(part in code.co_filename for part in _LIBRARIES)
        if not in_collective and not in_wait:
            break
        name = name if code.co_name == "wrapper" else code.co_name
        current = current.f_back
    return f"{name}, called in {_describe(current)}" if name else None


def _describe(frame: FrameType | None) -> str:
    if frame is None:
        return "no Python"
    path = Path(frame.f_code.co_filename)
    place = "/".join(path.parts[-3:])
    return f"{frame.f_code.co_name} ({place}:{frame.f_lineno})"
