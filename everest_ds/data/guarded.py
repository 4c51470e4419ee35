"""Calls that may hang or end their process, each in a process that can be killed.

Place in the flow: items -> processes -> outcomes, in the order in which they come. A decoder that hangs in C
cannot be interrupted from Python; killing its process is the only way out.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_STARTING_S = 120.0


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """What became of a call.

    Attributes:
        item: What it was called with.
        result: What it returned; None where it did not.
        fault: Why it did not, in words; None where it did.
        hung: Whether it was killed for taking too long.
        took_s: Seconds of it.
    """

    item: Item
    result: Result | None
    fault: str | None = None
    hung: bool = False
    took_s: float = 0.0


def run_guarded(
    function: Callable[[Item], Result], items: Sequence[Item], *, processes: int, timeout_s: float
) -> Iterator[Outcome[Item, Result]]:
    """Call a function with each item, in processes that are killed and replaced when a call takes too long.

    The function must not raise; what it cannot do is for its result to say. It is called once for each item.

    Args:
        function: Can be pickled.
        items: Can be pickled.
        processes: How many calls go at a time.
        timeout_s: Seconds that a call may take.

    Yields:
        An outcome of each item, as they come.
    """
    waiting = deque(items)
    workers = [_Worker(function) for _ in range(min(processes, len(waiting)))]
    try:
        for worker in workers:
            worker.give(waiting.popleft(), timeout_s)
        while busy := [worker for worker in workers if worker.is_busy]:
            for worker in _wait(busy):
                yield worker.take()
                if waiting:
                    worker.give(waiting.popleft(), timeout_s)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that makes one call after another, and is replaced when it has to be killed or dies."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._item: Any = None
        self.is_busy = False
        self._start()

    def _start(self) -> None:
        context = get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self._function, theirs), daemon=True)
        self.process.start()
        theirs.close()
        # The first thing that a process says is that it is there, so that a call's time is the call's alone.
        self._is_ready = False

    def give(self, item: Any, timeout_s: float) -> None:
        """Start a call."""
        if not self.process.is_alive():
            self._start()
        self._item, self.is_busy, self._timeout_s = item, True, timeout_s
        self._started = time.monotonic()
        self._deadline = self._started + (timeout_s if self._is_ready else _STARTING_S)
        self.pipe.send(item)

    def seconds_left(self) -> float:
        """Return the seconds until the call has taken too long."""
        return self._deadline - time.monotonic()

    def has_ended(self) -> bool:
        """Return whether there is an outcome to take."""
        if not self._is_ready and self.pipe.poll():
            try:
                self.pipe.recv()
            except (EOFError, OSError):
                return True
            self._is_ready = True
            self._started = time.monotonic()
            self._deadline = self._started + self._timeout_s
        return self.pipe.poll() or not self.process.is_alive() or self.seconds_left() <= 0

    def take(self) -> Outcome[Any, Any]:
        """Return the outcome of the call that has ended."""
        self.is_busy = False
        took_s = time.monotonic() - self._started
        if self.pipe.poll():
            try:
                return Outcome(self._item, self.pipe.recv(), took_s=took_s)
            except (EOFError, OSError):  # the process died, which makes its end of the pipe readable
                self.process.join(_STARTING_S)
        hung = self.process.is_alive()
        self.stop()
        if hung:
            return Outcome(self._item, None, f"no answer within {self._timeout_s:g} s", hung=True, took_s=took_s)
        code = self.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return Outcome(self._item, None, f"it ended its process ({how})", took_s=took_s)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _wait(busy: Sequence[_Worker]) -> list[_Worker]:
    """Wait until calls have ended, and return their workers."""
    while not (ended := [worker for worker in busy if worker.has_ended()]):
        nearest = max(min(worker.seconds_left() for worker in busy), 0)
        connection.wait([part for w in busy for part in (w.pipe, w.process.sentinel)], timeout=nearest)
    return ended


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    pipe.send(None)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        pipe.send(function(item))
