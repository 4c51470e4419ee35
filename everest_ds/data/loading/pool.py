"""A pool of worker processes that survives hanging and crashing calls.

A decoder that hangs in C cannot be interrupted from Python, and one that crashes takes its process along. So the
loader, `everest check-data` and `everest prepare` open videos in workers. A worker that hangs is killed, a worker
that has ended is replaced, and the other items that it was given are queued again.
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
"""Reports the step that a call has reached, and restarts its timeout."""

# Terminals and launchers signal whole trees of processes. Workers leave the decision to their parent.
_LEFT_TO_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_STARTING_S = 120.0
_MAX_FAILED_STARTS = 3
_LOOK_AGAIN_S = 60.0
# Imported once by the fork server, which saves each worker seconds; only those that its parent uses too.
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
        result: What it returned; None where it failed.
        fault: Why it failed, in words; None where it returned.
        hung: Whether its worker was killed for taking too long.
        mark: The last step that a failed call has reported; None for none.
        took_s: Seconds that it ran.
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
        function: Can be pickled; called with an item and a `Mark`. `wait` raises what it raises.
        num_workers: Number of processes.
        timeout_s: Seconds that a call may take, or that may pass between two marks of it.
        depth: Items that a worker is given at a time, so that it need not wait for the next.
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
        # Runs before multiprocessing's own end, which would wait for workers that ignore its SIGTERM.
        self._closed = threading.Event()
        self._end = util.Finalize(self, _stop_all, args=(self._workers, self._closed), exitpriority=10)

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid or 0 for worker in self._workers]

    def submit(self, item: Item, *, first: bool = False) -> None:
        """Queue an item at the end, or before all others."""
        if first:
            self._waiting.appendleft(item)
        else:
            self._waiting.append(item)
        self._hand_out()

    def wait(self, timeout_s: float) -> list[Outcome[Item, Result]]:
        """Return the calls that have ended; none if no call ends within ``timeout_s`` seconds.

        Raises:
            UserError: The function raised one.
            RuntimeError: The function raised anything else, or workers end before they can begin.
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
        """End the workers; their calls are lost."""
        self._end()

    def _hand_out(self) -> None:
        for depth in range(1, self._depth + 1):
            for worker in self._workers:
                if self._waiting and len(worker.items) < depth:
                    worker.give(self._waiting.popleft())

    def _collect(self, number: int) -> list[Outcome[Item, Result]]:
        """Return the calls of a worker that have ended; replace the worker if it has ended or hangs."""
        worker = self._workers[number]
        ended = not worker.process.is_alive()  # asked before its last answers are read
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
    """One process, and the items that it was given and has not answered."""

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
        """Let it call the function with an item, after those that it has."""
        if not self.items and self.is_ready:
            self._restart_clock()
        self.items.append(item)
        with contextlib.suppress(BrokenPipeError):  # it has ended; its sentinel tells
            self.pipe.send(item)

    def receive(self) -> list[Outcome[Any, Any]]:
        """Return the calls that have returned."""
        outcomes = []
        with contextlib.suppress(EOFError, OSError):  # it has ended; its sentinel tells
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
        """Return the seconds until it counts as hanging."""
        if not self.is_ready:
            return self._since + _STARTING_S - time.monotonic()
        return self._since + self._timeout_s - time.monotonic() if self.items else float("inf")

    def fail(self, *, hung: bool) -> Outcome[Any, Any]:
        """Return the call that hung or ended the process."""
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
    """Call a function once with each item, in workers that may hang or crash; yield outcomes as they come.

    Close the generator when done with it early: that ends the workers.

    Args:
        function: Can be pickled, as the items can; must not raise.
        items: What it is called with.
        num_workers: Calls at a time.
        timeout_s: Seconds that a call may take.
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
    """Start the fork server, unless it runs, with the signals blocked; workers inherit that.

    Who knows that workers will be needed may call this early: the server imports while its parent does other work.

    A worker imports for seconds before it could ignore a signal. A blocked signal waits meanwhile.
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
    """Answer calls until the other end is gone."""
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
            except Exception:  # of any kind: the parent raises it, with the traceback as its text
                answer = ("raised", RuntimeError(f"in a process that reads videos:\n{traceback.format_exc()}"))
            pipe.send(answer)


def _end_with_fork_server() -> None:
    """Let the kernel kill this worker when the fork server ends, and that end with the process of the pool.

    The fork server ends once nobody holds the other end of a pipe; Python gives that end to every worker, too.
    """
    server: Any = forkserver._forkserver
    held = getattr(server, "_forkserver_alive_fd", None)
    if held is not None:
        os.close(held)
        server._forkserver_alive_fd = None
    end_with_parent()


def _end_with_parent() -> None:
    """End this process with its parent, also out of a call that hangs."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
