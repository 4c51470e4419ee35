"""Processes whose calls may hang or end them: such a process is killed and replaced, and no call is lost.

Place in the flow: what `everest check-data` and the loader hand to other processes. A decoder that hangs in C
cannot be interrupted from Python, and one that crashes takes its process along: only another process can deal with
either.
"""

import contextlib
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, forkserver, get_context, parent_process, resource_tracker, util
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from everest_ds.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
Mark = Callable[[int], None]
"""Says how far a call is. A call that says so in time is not taken for one that hangs."""

# Terminals and launchers signal whole trees of processes. These ones leave the decision to their parent.
_LEFT_TO_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_STARTING_S = 120.0
_MAX_FAILED_STARTS = 3
# What the fork server imports once, instead of each of the processes that it starts: seconds each.
_PRELOADED = ["everest_ds.data.clips.dataset", "everest_ds.data.clips.views", "everest_ds.data.curation.probe"]


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What became of a call.

    Attributes:
        item: What it was called with.
        result: What it returned; None where it did not.
        fault: Why it did not, in words; None where it did.
        hung: Whether it was killed for taking too long.
        mark: How far it said it was, where it did not return; None where it had said nothing.
        took_s: Seconds of it.
    """

    item: Item
    result: Result | None
    fault: str | None = None
    hung: bool = False
    mark: int | None = None
    took_s: float = 0.0


class Pool(Generic[Item, Result]):
    """Processes from a fork server that call a function with one item after another.

    A call that takes too long, from its start or from its last mark, ends with its process; so does one that ends
    its process itself. The process is replaced, and what else it had been given goes to others.

    Args:
        function: Can be pickled; called with an item and a `Mark`. What it raises, `wait` raises here.
        processes: How many there are.
        timeout_s: Seconds from one mark to the next.
        depth: Items that a process is given at a time, so that it need not wait for the next.
        begin: Called in each process as it begins.
    """

    def __init__(
        self,
        function: Callable[[Item, Mark], Result],
        *,
        processes: int,
        timeout_s: float,
        depth: int = 1,
        begin: Callable[[], None] | None = None,
    ) -> None:
        self._waiting: deque[Item] = deque()
        self._depth = depth
        self._failed_starts = 0
        _start_fork_server()
        self._workers = [_Worker(function, begin, timeout_s) for _ in range(processes)]
        # Before multiprocessing's own end, which would wait for processes that ignore its SIGTERM.
        self._closed = threading.Event()
        self._end = util.Finalize(self, _stop_all, args=(self._workers, self._closed), exitpriority=10)

    @property
    def pids(self) -> list[int]:
        """The processes."""
        return [worker.process.pid or 0 for worker in self._workers]

    def submit(self, item: Item, *, first: bool = False) -> None:
        """Put an item into the queue, at its end or before all others."""
        if first:
            self._waiting.appendleft(item)
        else:
            self._waiting.append(item)
        self._give()

    def wait(self, timeout_s: float) -> list[Outcome[Item, Result]]:
        """Return the calls that have ended, at least one unless nothing happens within ``timeout_s`` seconds.

        Raises:
            UserError: The function raised one.
            RuntimeError: The function raised anything else, or processes end before they can begin.
        """
        until = time.monotonic() + timeout_s
        while not self._closed.is_set():
            outcomes = [outcome for worker in self._workers for outcome in self._look_after(worker)]
            self._give()
            left_s = until - time.monotonic()
            if outcomes or left_s <= 0:
                return outcomes
            left_s = min([left_s, *(worker.seconds_left() for worker in self._workers)])
            parts = [part for worker in self._workers for part in (worker.pipe, worker.process.sentinel)]
            connection.wait(parts, timeout=max(left_s, 0))
        return []

    def close(self) -> None:
        """End the processes; what they were doing is lost."""
        self._end()

    def _give(self) -> None:
        for depth in range(1, self._depth + 1):
            for worker in self._workers:
                if self._waiting and len(worker.items) < depth:
                    worker.give(self._waiting.popleft())

    def _look_after(self, worker: "_Worker") -> list[Outcome[Item, Result]]:
        """Take what a process has to say; replace it where it has ended or hangs."""
        ended = not worker.process.is_alive()
        outcomes = worker.take()
        hung = not ended and worker.seconds_left() <= 0
        if not ended and not hung:
            return outcomes
        worker.stop()
        self._failed_starts = 0 if worker.is_ready else self._failed_starts + 1
        if self._failed_starts > _MAX_FAILED_STARTS:
            raise RuntimeError(f"processes that read videos end before they can begin ({worker.how_it_ended()})")
        items = list(worker.items)
        if worker.is_ready and items:
            fault = worker.how_it_hung() if hung else f"it ended its process ({worker.how_it_ended()})"
            taken_s = worker.seconds_taken()
            outcomes.append(Outcome(items.pop(0), None, fault, hung=hung, mark=worker.mark, took_s=taken_s))
        self._waiting.extendleft(reversed(items))
        worker.start()
        return outcomes


class _Worker:
    """One process, and what it was given."""

    def __init__(
        self, function: Callable[[Any, Mark], Any], begin: Callable[[], None] | None, timeout_s: float
    ) -> None:
        self._function, self._begin, self._timeout_s = function, begin, timeout_s
        self.start()

    def start(self) -> None:
        """Begin afresh, with nothing to do."""
        context = get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self._function, self._begin, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.items: deque[Any] = deque()
        self.is_ready = False
        self.mark: int | None = None
        self._restart_clock()

    def give(self, item: Any) -> None:
        """Let it call the function with an item, after those that it has."""
        if not self.items and self.is_ready:
            self._restart_clock()
        self.items.append(item)
        with contextlib.suppress(BrokenPipeError):  # it has ended, as its sentinel tells
            self.pipe.send(item)

    def take(self) -> list[Outcome[Any, Any]]:
        """Return the calls that have returned."""
        outcomes = []
        with contextlib.suppress(EOFError, OSError):  # it has ended, as its sentinel tells
            while self.pipe.poll():
                what, value = self.pipe.recv()
                if what == "mark":
                    self.mark, self._since = value, time.monotonic()
                    continue
                if what == "raised":
                    raise value
                if what == "done":
                    outcomes.append(Outcome(self.items.popleft(), value, took_s=self.seconds_taken()))
                self.is_ready = True
                self._restart_clock()
        return outcomes

    def seconds_taken(self) -> float:
        """Return the seconds since the first of its items was begun."""
        return time.monotonic() - self._began

    def seconds_left(self) -> float:
        """Return the seconds until it is taken to hang."""
        if not self.is_ready:
            return self._since + _STARTING_S - time.monotonic()
        return self._since + self._timeout_s - time.monotonic() if self.items else float("inf")

    def how_it_hung(self) -> str:
        """Return for how long it has said nothing, in words."""
        return f"no answer within {self._timeout_s:g} s"

    def how_it_ended(self) -> str:
        """Return its exit code or signal, in words."""
        code = self.process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _restart_clock(self) -> None:
        self.mark = None
        self._began = self._since = time.monotonic()


def _start_fork_server() -> None:
    """Start the fork server, unless it runs, with those signals blocked: its processes inherit that.

    It imports for seconds before its own processes could ignore a signal. Here a signal that comes meanwhile waits.
    """
    get_context("forkserver").set_forkserver_preload(_PRELOADED)
    resource_tracker.ensure_running()  # it unblocks signals, so it comes first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_PARENT)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop_all(workers: Sequence[_Worker], closed: threading.Event) -> None:
    closed.set()
    for worker in workers:
        worker.stop()


def _serve(function: Callable[[Any, Mark], Any], begin: Callable[[], None] | None, pipe: Connection) -> None:
    """Answer calls until the other end is gone."""
    for number in _LEFT_TO_PARENT:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if begin is not None:
        begin()

    def mark(how_far: int) -> None:
        pipe.send(("mark", how_far))

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(("ready", None))
        while True:
            item = pipe.recv()
            try:
                answer = ("done", function(item, mark))
            except Exception as error:  # whatever it is, it belongs to the process that asked
                answer = ("raised", _portable(error))
            pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """Return an exception that can be sent, with its traceback as its text unless it is for the user."""
    if isinstance(error, UserError):
        return UserError(str(error))
    return RuntimeError(f"in a process that reads videos:\n{traceback.format_exc()}")


def _leave_with_parent() -> None:
    """End this process with the one that started it, also out of a call that hangs."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


__all__ = ["Outcome", "run_guarded"]


_LOOK_AGAIN_S = 60.0


def run_guarded(
    function: Callable[[Item], Result], items: Sequence[Item], *, processes: int, timeout_s: float
) -> Generator[Outcome[Item, Result]]:
    """Call a function with each item, in processes that are killed and replaced when a call takes too long.

    The function must not raise; what it cannot do is for its result to say. It is called once for each item.

    Args:
        function: Can be pickled.
        items: Can be pickled.
        processes: How many calls go at a time.
        timeout_s: Seconds that a call may take.

    Close what is returned when done with it early: that ends the processes.

    Yields:
        An outcome of each item, as they come.
    """
    if not items:
        return
    call = partial(_call, function)
    pool: Pool[Item, Result] = Pool(call, processes=min(processes, len(items)), timeout_s=timeout_s)
    try:
        for item in items:
            pool.submit(item)
        left = len(items)
        while left:
            for outcome in pool.wait(_LOOK_AGAIN_S):
                left -= 1
                yield outcome
    finally:
        pool.close()


def _call(function: Callable[[Item], Result], item: Item, mark: Mark) -> Result:
    return function(item)
