"""Separates the output of libraries, which goes to a file, from the command's own. A leaf with few imports.

Launchers, DeepSpeed, gloo, NCCL, FFmpeg and Python's warnings write to file descriptors 1 and 2. During a training
these lead to a file, and `sys.stdout` and `sys.stderr` of rank 0 lead to the terminal.
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
"""Descriptor of the terminal's stderr, for writing without Python's buffers."""
_CHUNK = 1 << 20


class _Aside:
    """The redirected output.

    Attributes:
        early: Descriptor of a file in memory, for output before there is a log file. Processes that were started
            before then keep writing to it.
        taken: Bytes of ``early`` that were copied to the log file.
        log: Descriptor of the log file.
    """

    early: int | None = None
    taken = 0
    log: int | None = None


@contextlib.contextmanager
def set_aside(*, speaks: bool) -> Iterator[None]:
    """Redirect the output of libraries inside this block; do nothing if stdout was already replaced.

    If a bug ends the block before `keep_in` named a file, the output is printed after all.

    Args:
        speaks: Whether this process prints to stdout; True on rank 0.
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
    except (UserError, KeyboardInterrupt):  # these have a message of their own
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
    """Append the redirected output, earlier and later, to a file; return whether output is redirected.

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
    """Redirect the prints of Python code too inside this block, for imports that bind `sys.stdout`."""
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
    """Write a Python warning to the redirected output."""
    stream = file or sys.__stderr__
    if stream is not None:
        stream.write(warnings.formatwarning(message, category, filename, lineno, line))
        stream.flush()


def _take_early() -> None:
    """Append new output in memory to the log file."""
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
    """Return a text stream over a descriptor, which it does not close."""
    raw = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
    return io.TextIOWrapper(
        raw, encoding=like.encoding if like else None, errors="backslashreplace", line_buffering=True
    )


def _flush(*streams: TextIO | None) -> None:
    for stream in streams:
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
