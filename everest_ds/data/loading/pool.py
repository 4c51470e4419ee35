"""A pool of worker processes that survives hanging and crashing calls.

A decoder that hangs in C cannot be interrupted from Python, and one that crashes ends its process. So the loader,
`everest check-data` and `everest prepare` open videos in workers. A worker that hangs is killed; a worker that has
ended is replaced, and its other items are queued again.
"""

import contextlib
import os
import signal
import sys
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

from everest_ds import pulse, stacks
from everest_ds.errors import UserError
from everest_ds.processes import end_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")
Mark = Callable[[int], None]
"""Reports how far a call has got, as a step number, and restarts its timeout."""

# Terminals and launchers signal whole process trees. Workers ignore these signals and end with their parent.
_LEFT_TO_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_STARTING_S = 120.0
_MAX_FAILED_STARTS = 3
_LOOK_AGAIN_S = 60.0
# Imported once by the fork server, which saves each worker seconds; only those that the parent has imported.
_PRELOADED = [
    "everest_ds.data.clips.dataset",
    "everest_ds.data.clips.views",
    "everest_ds.data.curation.probe",
    "everest_ds.data.curation.reencode",
    "everest_ds.data.readers.pyav",
]


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """Result of a call, or how it failed.

    Attributes:
        item: Argument of the call.
        result: Return value; None if the call failed.
        fault: Why the call failed, in words; None if it returned.
        hung: Whether the worker was killed because the call timed out.
        mark: Last step that a failed call reported; None if it reported none.
        took_s: Duration of the call in seconds.
    """

    item: Item
    result: Result | None
    fault: str | None = None
    hung: bool = False
    mark: int | None = None
    took_s: float = 0.0


class Pool(Generic[Item, Result]):
    """Workers that call a function with one item after another; see the module.

    Args:
        function: Picklable; called with an item and a `Mark`. Its exceptions are raised by `wait`.
        num_workers: Number of processes.
        timeout_s: Longest duration of a call in seconds, or longest time between two of its marks.
        depth: Items queued in a worker, so that it never idles between two.
    """

    def __init__(
        self, function: Callable[[Item, Mark], Result], *, num_workers: int, timeout_s: float, depth: int = 1
    ) -> None:
        self._start_worker = partial(_Worker, function, timeout_s)
        self._depth = depth
        self._waiting: deque[Item] = deque()
        self._failed_starts = 0
        start_fork_server()
        self._workers = [self._start_worker() for _ in range(num_workers)]
        # Runs before multiprocessing's own cleanup, which would wait for workers that ignore its SIGTERM.
        self._closed = threading.Event()
        self._end = util.Finalize(self, _stop_all, args=(self._workers, self._closed), exitpriority=10)

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid or 0 for worker in self._workers]

    def submit(self, item: Item, *, first: bool = False) -> None:
        """Queue an item: at the end, or with ``first`` before all others."""
        if first:
            self._waiting.appendleft(item)
        else:
            self._waiting.append(item)
        self._hand_out()

    def wait(self, timeout_s: float) -> list[Outcome[Item, Result]]:
        """Return the calls that have ended; an empty list if no call ends within ``timeout_s`` seconds.

        Raises:
            UserError: The function raised one.
            RuntimeError: The function raised any other exception, or workers repeatedly fail to start.
        """
        until = time.monotonic() + timeout_s
        while not self._closed.is_set():
            outcomes = [outcome for number in range(len(self._workers)) for outcome in self._collect(number)]
            self._hand_out()
            left_s = until - time.monotonic()
            if outcomes or left_s <= 0:
                return outcomes
            left_s = min([left_s, *(worker.seconds_left() for worker in self._workers)])
            handles = [handle for worker in self._workers for handle in (worker.pipe, worker.process.sentinel)]
            connection.wait(handles, timeout=max(left_s, 0))
        return []

    def close(self) -> None:
        """Kill the workers; unfinished calls are lost."""
        self._end()

    def _hand_out(self) -> None:
        for depth in range(1, self._depth + 1):
            for worker in self._workers:
                if self._waiting and len(worker.items) < depth:
                    worker.give(self._waiting.popleft())

    def _collect(self, number: int) -> list[Outcome[Item, Result]]:
        """Return the calls of a worker that have ended; replace the worker if it has crashed or hangs."""
        worker = self._workers[number]
        ended = not worker.process.is_alive()  # checked first: answers sent before the end are still received
        outcomes = worker.receive()
        hung = not ended and worker.seconds_left() <= 0
        if not ended and not hung:
            return outcomes
        worker.stop()
        pulse.beat()
        self._failed_starts = 0 if worker.is_ready else self._failed_starts + 1
        if self._failed_starts > _MAX_FAILED_STARTS:
            raise RuntimeError(f"processes that read videos end before they can begin ({worker.how_it_ended()})")
        if worker.is_ready and worker.items:
            outcomes.append(worker.fail(hung=hung))
        self._waiting.extendleft(reversed(worker.items))
        self._workers[number] = self._start_worker()
        return outcomes


class _Worker:
    """One process, and the items sent to it whose answers are still missing."""

    def __init__(self, function: Callable[[Any, Mark], Any], timeout_s: float) -> None:
        context = get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.items: deque[Any] = deque()
        self.is_ready = False
        self._timeout_s = timeout_s
        self._mark: int | None = None
        self._began = self._since = time.monotonic()

    def give(self, item: Any) -> None:
        """Queue an item in the worker, after those that it has."""
        if not self.items and self.is_ready:
            self._restart_clock()
        self.items.append(item)
        with contextlib.suppress(BrokenPipeError):  # it has ended; `Pool._collect` notices by its sentinel
            self.pipe.send(item)

    def receive(self) -> list[Outcome[Any, Any]]:
        """Return the finished calls."""
        outcomes = []
        with contextlib.suppress(EOFError, OSError):  # it has ended; `Pool._collect` notices by its sentinel
            while self.pipe.poll():
                what, value = self.pipe.recv()
                pulse.beat()
                if what == "mark":
                    self._mark, self._since = value, time.monotonic()
                    continue
                if what == "raised":
                    raise value
                if what == "done":
                    outcomes.append(Outcome(self.items.popleft(), value, took_s=time.monotonic() - self._began))
                self.is_ready = True
                self._restart_clock()
        return outcomes

    def seconds_left(self) -> float:
        """Return the seconds until the worker counts as hanging."""
        if not self.is_ready:
            return self._since + _STARTING_S - time.monotonic()
        return self._since + self._timeout_s - time.monotonic() if self.items else float("inf")

    def fail(self, *, hung: bool) -> Outcome[Any, Any]:
        """Return the outcome of the call that hung or ended the process."""
        fault = (
            f"no answer within {self._timeout_s:g} s" if hung else f"it ended its process ({self.how_it_ended()})"
        )
        took_s = time.monotonic() - self._began
        return Outcome(self.items.popleft(), None, fault, hung=hung, mark=self._mark, took_s=took_s)

    def how_it_ended(self) -> str:
        code = self.process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _restart_clock(self) -> None:
        self._mark = None
        self._began = self._since = time.monotonic()


def run_all(
    function: Callable[[Item], Result], items: Sequence[Item], *, num_workers: int, timeout_s: float
) -> Generator[Outcome[Item, Result]]:
    """Call a function once with each item, in workers that may hang or crash; yield outcomes as calls end.

    Close the generator when stopping early: that ends the workers.

    Args:
        function: Picklable; must not raise.
        items: Arguments of the calls, picklable.
        num_workers: Largest number of processes.
        timeout_s: Longest duration of a call in seconds.
    """
    if not items:
        return
    call = partial(_call_without_mark, function)
    pool: Pool[Item, Result] = Pool(call, num_workers=min(num_workers, len(items)), timeout_s=timeout_s)
    with contextlib.closing(pool):
        for item in items:
            pool.submit(item)
        left = len(items)
        while left:
            for outcome in pool.wait(_LOOK_AGAIN_S):
                left -= 1
                yield outcome


def _call_without_mark(function: Callable[[Item], Result], item: Item, mark: Mark) -> Result:
    return function(item)


def start_fork_server() -> None:
    """Start the fork server, unless it runs, with signals blocked; workers inherit the blocked signals.

    Callers that will need workers may call this early: the server imports while its parent does other work.

    A worker spends seconds on imports before it can ignore signals. Blocked signals stay pending until then.
    """
    get_context("forkserver").set_forkserver_preload([name for name in _PRELOADED if name in sys.modules])
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


def _serve(function: Callable[[Any, Mark], Any], pipe: Connection) -> None:
    """Answer calls until the parent closes the pipe."""
    _end_with_fork_server()
    for number in _LEFT_TO_PARENT:
        signal.signal(number, signal.SIG_IGN)
    stacks.keep_stacks_ready()
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def mark(step: int) -> None:
        pipe.send(("mark", step))

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(("ready", None))
        while True:
            item = pipe.recv()
            try:
                answer = ("done", function(item, mark))
            except UserError as error:
                answer = ("raised", UserError(str(error)))
            except Exception:  # the parent raises it, with the traceback as text
                answer = ("raised", RuntimeError(f"in a process that reads videos:\n{traceback.format_exc()}"))
            pipe.send(answer)


def _end_with_fork_server() -> None:
    """Make the kernel kill this worker when the fork server ends, and the fork server end with its parent.

    The fork server ends when the last copy of a pipe's other end is closed. Python gives a copy to every worker,
    so workers would keep it alive: close it here.
    """
    server: Any = forkserver._forkserver
    held = getattr(server, "_forkserver_alive_fd", None)
    if held is not None:
        os.close(held)
        server._forkserver_alive_fd = None
    end_with_parent()


def _end_with_parent() -> None:
    """End this process when its parent ends, even while a call hangs."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
