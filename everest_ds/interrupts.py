"""How a command ends at Ctrl-C. A leaf.

A command's `Mode` says what happens at the first SIGINT:

* the process prints one line and ends at once: while modules are imported, and in a launch of several processes;
* KeyboardInterrupt is raised, so that files and processes are cleaned up: a command of one process;
* the request is noted, and the run saves at the next step boundary: training (`everest_ds.train.signals`).

A second SIGINT ends the process at once in every mode. Python runs signal handlers only in the main thread, between
two instructions, so never inside a collective that hangs. Therefore another thread reads signals from a pipe.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from everest_ds.console import streams
from everest_ds.processes import kill_tree

if TYPE_CHECKING:
    from subprocess import Popen

_EXIT_INTERRUPTED = 128 + signal.SIGINT
# One request may arrive twice: a launcher passes on, a moment later, a signal that its process group received too;
# `timeout` sends a signal to its child and to its group.
SAME_REQUEST_S = 2.0 if "LOCAL_RANK" in os.environ else 0.5

# Not the number of a signal: it asks the thread to send SIGINT to the main thread again.
_AGAIN = 0
_SEND_AGAIN_AFTER_S = 0.02
_WAIT_FOR_THREAD_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How a process reacts to a signal."""

    in_main: Callable[[int, FrameType | None], None]
    """Called in the main thread, as soon as it runs Python, with the signal's number and the frame."""
    in_thread: Callable[[int, float | None], None]
    """Called at once in the listening thread, with the signal's number and the seconds since the first signal
    (None for the first)."""


class _State:
    """How this process reacts to the next signal, and the signals that it has received."""

    def __init__(self) -> None:
        self.mode = Mode(in_main=_ignore, in_thread=_ignore)
        self.say: Callable[[], object] = _ignore
        self.pipe: tuple[int, int] | None = None
        self.numbers: frozenset[int] = frozenset()
        self.first_at: float | None = None
        self.is_ours = False  # whether the process belongs to a command
        self.was_raised = self.is_deferred = self.is_due = False
        self.children: set[Popen[Any]] = set()


def begin(say: Callable[[], object]) -> None:
    """From now on, end the process at SIGINT; called once, at the process's start, in its main thread.

    ``say`` prints that the command was interrupted. It may be called in any thread and must not import anything.
    """
    _state.say, _state.mode, _state.is_ours = say, LEAVE, True
    _watch((signal.SIGINT,))
    signal.signal(signal.SIGINT, _handle)
    sys.unraisablehook = _raise_again


def unwind() -> None:
    """From now on, raise KeyboardInterrupt at SIGINT, if `begin` was called before."""
    if _state.mode == LEAVE:
        _state.mode = UNWIND


def finish() -> None:
    """From now on, ignore the first SIGINT: everything is written, and the process is about to end."""
    if _state.mode in (LEAVE, UNWIND):
        _state.mode = FINISH


def was_raised() -> bool:
    """Return whether SIGINT has raised KeyboardInterrupt. Later errors are consequences of it."""
    return _state.was_raised


def is_requested() -> bool:
    """Return whether a signal that this process handles has arrived and is still being handled."""
    return _state.first_at is not None or _state.was_raised


def write_past_buffers(text: str) -> None:
    """Write to stderr from any thread, without Python's buffers, which may be locked. A closed pipe is ignored."""
    with contextlib.suppress(OSError):
        os.write(streams.stderr_fd, text.encode())


@contextlib.contextmanager
def handling(numbers: Sequence[signal.Signals], mode: Mode, *, ignore_after: Callable[[], bool]) -> Iterator[None]:
    """Handle signals in another mode inside this block, and as after `finish` behind it; main thread only.

    ``ignore_after`` is called at the block's end and returns whether the signals are ignored from then on.
    """
    _watch(numbers)
    known = _state.numbers
    _state.mode, _state.first_at, _state.numbers = mode, None, known | set(numbers)
    before = {number: signal.signal(number, _handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ignore_after() else handler)
        _state.mode, _state.first_at, _state.numbers = FINISH, None, known


@contextlib.contextmanager
def ending_with_us(process: "Popen[Any]") -> Iterator[None]:
    """Kill a process and its descendants if this process is interrupted, or fails, inside this block."""
    _state.children.add(process)
    try:
        yield
    except BaseException:
        _kill(process)
        raise
    finally:
        _state.children.discard(process)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Raise KeyboardInterrupt after this block instead of inside it, so that nothing is lost."""
    _state.is_deferred = True
    try:
        yield
    finally:
        _state.is_deferred = False
    if _state.is_due:
        _state.is_due = False
        _raise_once(signal.SIGINT, None)


def allow_lost_reader() -> None:
    """Drop output once its reader has ended: in `everest ... | tee log`, Ctrl-C ends tee as well."""
    if _state.is_ours:
        sys.stdout, sys.stderr = _ForgivingStream(sys.stdout), _ForgivingStream(sys.stderr)


class _ForgivingStream:
    """An output stream that drops its text once the reader has ended."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def leave_at_second(signum: int, since_first_s: float | None) -> None:
    """End the process at a second signal that is not a repetition of the first; for `Mode.in_thread`."""
    if since_first_s is not None and since_first_s > SAME_REQUEST_S:
        os._exit(128 + signum)


def _watch(numbers: Sequence[signal.Signals]) -> None:
    """Start the thread that listens for signals, unless it is running."""
    _state.numbers |= set(numbers)
    if _state.pipe is not None:
        return
    _state.pipe = os.pipe()
    os.set_blocking(_state.pipe[1], False)
    signal.set_wakeup_fd(_state.pipe[1], warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(_state.pipe[0],), name="signals", daemon=True).start()


def _listen(pipe: int) -> None:
    while True:
        for number in os.read(pipe, 1):
            if number == _AGAIN:
                time.sleep(_SEND_AGAIN_AFTER_S)
                _state.first_at = None  # the signal that is sent now counts as the first one
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            elif number in _state.numbers:
                now, first_at = time.monotonic(), _state.first_at
                _state.first_at = now if first_at is None else first_at
                _state.mode.in_thread(number, None if first_at is None else now - first_at)


def _handle(signum: int, frame: FrameType | None) -> None:
    _state.mode.in_main(signum, frame)


def _leave(*_: object) -> None:
    """Print the message and end the process with its children."""
    for process in list(_state.children):
        _kill(process)
    with contextlib.suppress(OSError):  # the reader has ended
        _state.say()
    os._exit(_EXIT_INTERRUPTED)


def _wait_for_thread(*_: object) -> None:
    """Wait in the main thread until the listening thread ends the process."""
    time.sleep(_WAIT_FOR_THREAD_S)
    os._exit(_EXIT_INTERRUPTED)


def _raise_once(signum: int, frame: FrameType | None) -> None:
    if _state.was_raised:  # clean-up is not interrupted again
        return
    if _state.is_deferred:
        _state.is_due = True
        return
    if _is_importing(frame):  # clean-up would fail on a partly imported module
        _leave()
    _state.was_raised = True
    allow_lost_reader()
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _raise_again(problem: Any) -> None:
    """Interrupt again a little later if Python has dropped a KeyboardInterrupt, for example in a `__del__`."""
    if problem.exc_type is KeyboardInterrupt and _state.pipe is not None:
        _state.was_raised = False
        os.write(_state.pipe[1], bytes([_AGAIN]))
    else:
        sys.__unraisablehook__(problem)


def _kill(process: "Popen[Any]") -> None:
    if process.returncode is None:  # otherwise its number may belong to another process by now
        kill_tree(process.pid)


def _ignore(*_: object) -> None:
    """Do nothing."""


LEAVE = Mode(in_main=_wait_for_thread, in_thread=_leave)
UNWIND = Mode(in_main=_raise_once, in_thread=leave_at_second)
FINISH = Mode(in_main=_ignore, in_thread=leave_at_second)
_state = _State()
