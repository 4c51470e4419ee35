"""What libraries print goes to a file, what the command says goes to people. A leaf that imports next to nothing.

Launchers, DeepSpeed, gloo, NCCL, FFmpeg and Python's warnings write to file descriptors 1 and 2. While a training
runs these lead to a file, and `sys.stdout` and `sys.stderr` of rank zero to where people read.
"""

import contextlib
import io
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from everest_ds.errors import UserError

stderr_fd = 2
"""Where people read errors: for writing past Python's buffers."""
_CHUNK = 1 << 20


class _Aside:
    """What is set aside at the moment.

    Attributes:
        early: The file in memory that holds what was printed before there was a log file; processes that were
            started before then write there to the end.
        taken: Bytes of it that are in the log file.
        log: Descriptor of the log file.
    """

    early: int | None = None
    taken = 0
    log: int | None = None


@contextlib.contextmanager
def set_aside(*, speaks: bool) -> Iterator[None]:
    """Keep what libraries print from people inside this block; nothing changes where stdout was replaced before.

    What was printed comes out after all when the block fails by a defect of ours before `keep_in` named a file.

    Args:
        speaks: Whether this process says anything on stdout: rank zero.
    """
    global stderr_fd
    out, err = sys.stdout, sys.stderr
    if out is None or err is None or out is not sys.__stdout__ or err is not sys.__stderr__:
        yield
        return
    before, showwarning = (out, err), warnings.showwarning
    _flush(*before)
    saved = os.dup(1), os.dup(2)
    _Aside.early, _Aside.taken, _Aside.log = os.memfd_create("everest-noise"), 0, None
    stderr_fd = saved[1]
    _lead_to(_Aside.early)
    if speaks:
        sys.stdout = _text(saved[0], out)
    sys.stderr = _text(saved[1], err)
    warnings.showwarning = _show_warning
    failed = True
    try:
        yield
        failed = False
    except (UserError, KeyboardInterrupt):  # say what is the matter themselves
        failed = False
        raise
    finally:
        _flush(sys.stdout, sys.stderr, *before)
        _take_early()
        if failed and _Aside.log is None:
            _show(_Aside.early, saved[1])
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        sys.stdout, sys.stderr = before
        warnings.showwarning = showwarning
        stderr_fd = 2
        for descriptor in (*saved, _Aside.early, _Aside.log):
            if descriptor is not None:
                os.close(descriptor)
        _Aside.early = _Aside.log = None


def keep_in(path: Path) -> bool:
    """Append what is set aside, so far and from now on, to a file; return whether anything is.

    Raises:
        OSError: The file cannot be written.
    """
    if _Aside.early is None or _Aside.log is not None:
        return _Aside.log is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    _Aside.log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    _flush(sys.__stdout__, sys.__stderr__)
    os.write(_Aside.log, f"--- process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
    _lead_to(_Aside.log)
    _take_early()
    return True


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Count what Python code prints in this block among what is set aside: imports that bind `sys.stdout`."""
    if _Aside.early is None or sys.__stdout__ is None or sys.__stderr__ is None:
        yield
        return
    with contextlib.redirect_stdout(sys.__stdout__), contextlib.redirect_stderr(sys.__stderr__):
        yield


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Write a warning of Python's among what is set aside."""
    stream = file or sys.__stderr__
    if stream is not None:
        stream.write(warnings.formatwarning(message, category, filename, lineno, line))
        stream.flush()


def _take_early() -> None:
    """Append what is new in memory to the log file."""
    if _Aside.early is None or _Aside.log is None:
        return
    while chunk := os.pread(_Aside.early, _CHUNK, _Aside.taken):
        os.write(_Aside.log, chunk)
        _Aside.taken += len(chunk)


def _show(early: int, descriptor: int) -> None:
    offset = 0
    while chunk := os.pread(early, _CHUNK, offset):
        os.write(descriptor, chunk)
        offset += len(chunk)


def _lead_to(descriptor: int) -> None:
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _text(descriptor: int, like: TextIO | None) -> TextIO:
    """Return a text stream over a descriptor that stays open after it."""
    raw = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
    return io.TextIOWrapper(
        raw, encoding=like.encoding if like else None, errors="backslashreplace", line_buffering=True
    )


def _flush(*streams: TextIO | None) -> None:
    for stream in streams:
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
