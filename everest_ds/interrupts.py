"""Ctrl-C: how a command ends when somebody presses it. A leaf.

At the first SIGINT a command does one of three things, its `Mode`:

* it leaves at once with one line: while modules are imported, and in a launch of several processes;
* it raises KeyboardInterrupt, so that files and processes are cleaned up: a command of one process;
* it notes the request and saves at the next step boundary: a training run (`everest_ds.train.signals`).

A second SIGINT ends the process at once in every mode. Python runs signal handlers in the main thread, between two
of its instructions: in a stuck collective never. So another thread reads every signal from a pipe.
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
# One request may arrive twice: a launcher passes on a signal, a moment later, that its process group received too;
# `timeout` sends one to its child and to its group.
SAME_REQUEST_S = 2.0 if "LOCAL_RANK" in os.environ else 0.5

# Not a signal's number: asks the thread to send SIGINT to the main thread again.
_AGAIN = 0
_SEND_AGAIN_AFTER_S = 0.02
_WAIT_FOR_THREAD_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Mode:
    """What a signal does."""

    in_main: Callable[[int, FrameType | None], None]
    """Called in the main thread, as soon as it runs Python, with the signal's number and the frame."""
    in_thread: Callable[[int, float | None], None]
    """Called at once in the listening thread, with the signal's number and the seconds since the first (None)."""


class _State:
    """What this process does at the next signal, and what it has received so far."""

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
    """Leave at once at SIGINT from now on; called once, as the process begins, by its main thread.

    ``say`` says that the command was interrupted. It is called in any thread, and must not import anything.
    """
    _state.say, _state.mode, _state.is_ours = say, LEAVE, True
    _watch((signal.SIGINT,))
    signal.signal(signal.SIGINT, _handle)
    sys.unraisablehook = _raise_again


def unwind() -> None:
    """Raise KeyboardInterrupt at SIGINT from now on, in a process that has begun so."""
    if _state.mode == LEAVE:
        _state.mode = UNWIND


def finish() -> None:
    """Ignore SIGINT from now on, but for a second one: everything is written, and the process is about to end."""
    if _state.mode in (LEAVE, UNWIND):
        _state.mode = FINISH


def was_raised() -> bool:
    """Return whether SIGINT has raised KeyboardInterrupt: whatever fails after that fails because of it."""
    return _state.was_raised


def is_requested() -> bool:
    """Return whether a signal that this process answers has come, and is not done with."""
    return _state.first_at is not None or _state.was_raised


def write_past_buffers(text: str) -> None:
    """Write to stderr from any thread, past Python's own buffers, which may be in use; nowhere if nobody reads."""
    with contextlib.suppress(OSError):
        os.write(streams.stderr_fd, text.encode())


@contextlib.contextmanager
def handling(numbers: Sequence[signal.Signals], mode: Mode, *, ignore_after: Callable[[], bool]) -> Iterator[None]:
    """Handle signals in another mode inside this block, and only finish after it; main thread only.

    ``ignore_after`` says, at the block's end, whether they are ignored from then on.
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
    """Kill a process and all that it has started if this one is interrupted, or fails, inside this block."""
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
    """Raise KeyboardInterrupt after this block instead of inside it, where something would be lost."""
    _state.is_deferred = True
    try:
        yield
    finally:
        _state.is_deferred = False
    if _state.is_due:
        _state.is_due = False
        _raise_once(signal.SIGINT, None)


def allow_lost_reader() -> None:
    """Let prints go nowhere once nobody reads them: in `everest ... | tee log`, Ctrl-C ends tee as well."""
    if _state.is_ours:
        sys.stdout, sys.stderr = _ForgivingStream(sys.stdout), _ForgivingStream(sys.stderr)


class _ForgivingStream:
    """A stream to the outside whose reader may go."""

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
    """End the process at a second signal that is no echo of the first; for `Mode.in_thread`."""
    if since_first_s is not None and since_first_s > SAME_REQUEST_S:
        os._exit(128 + signum)


def _watch(numbers: Sequence[signal.Signals]) -> None:
    """Start the thread that listens for signals, unless it runs."""
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
                _state.first_at = None  # the signal that is sent now is the first one again
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            elif number in _state.numbers:
                now, first_at = time.monotonic(), _state.first_at
                _state.first_at = now if first_at is None else first_at
                _state.mode.in_thread(number, None if first_at is None else now - first_at)


def _handle(signum: int, frame: FrameType | None) -> None:
    _state.mode.in_main(signum, frame)


def _leave(*_: object) -> None:
    """Say so and end the process; what it has started ends with it."""
    for process in list(_state.children):
        _kill(process)
    with contextlib.suppress(OSError):  # nobody reads what is said
        _state.say()
    os._exit(_EXIT_INTERRUPTED)


def _wait_for_thread(*_: object) -> None:
    """Do nothing more in the main thread: the other one ends the process."""
    time.sleep(_WAIT_FOR_THREAD_S)
    os._exit(_EXIT_INTERRUPTED)


def _raise_once(signum: int, frame: FrameType | None) -> None:
    if _state.was_raised:  # cleaning up is not interrupted again
        return
    if _state.is_deferred:
        _state.is_due = True
        return
    if _is_importing(frame):  # cleaning up would fail on a module that is half imported
        _leave()
    _state.was_raised = True
    allow_lost_reader()
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _raise_again(problem: Any) -> None:
    """Interrupt again a little later where Python dropped a KeyboardInterrupt, in a `__del__` for instance."""
    if problem.exc_type is KeyboardInterrupt and _state.pipe is not None:
        _state.was_raised = False
        os.write(_state.pipe[1], bytes([_AGAIN]))
    else:
        sys.__unraisablehook__(problem)


def _kill(process: "Popen[Any]") -> None:
    if process.returncode is None:  # or its number may be another process's by now
        kill_tree(process.pid)


def _ignore(*_: object) -> None:
    """Do nothing."""


LEAVE = Mode(in_main=_wait_for_thread, in_thread=_leave)
UNWIND = Mode(in_main=_raise_once, in_thread=leave_at_second)
FINISH = Mode(in_main=_ignore, in_thread=leave_at_second)
_state = _State()
