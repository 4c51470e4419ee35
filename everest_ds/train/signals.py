"""Being asked to stop: SIGTERM and SIGUSR1 let a run save at the next step boundary and leave.

Schedulers send one of them shortly before they take a machine away. Any process of the launch may receive it.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from everest_ds import distributed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# The conventional code of "a temporary failure, try again" (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75
# Launchers and schedulers both pass a signal on, so that one request may arrive twice in a moment.
SAME_REQUEST_S = 2.0


class StopRequest:
    """Notes the first signal; a second one, unless it is an echo of the first, ends the process at once."""

    def __init__(self) -> None:
        self._signum = 0
        self._received_at = 0.0
        self._leaving = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside this block; only the main thread may.

        Once the launch has agreed to stop they are ignored for good: a process that has saved and is on its way out
        leaves with its own exit code, whatever its launcher still sends.
        """
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self._leaving else handler)

    def agreed(self) -> signal.Signals | None:
        """Return the signal that any process of the launch has received; all ranks call this at the same step."""
        number = distributed.largest(self._signum)
        self._leaving = bool(number)
        return signal.Signals(number) if number else None

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signum:
            self._signum, self._received_at = signum, now
        elif now - self._received_at > SAME_REQUEST_S:
            os._exit(128 + signum)


def ignore_stop_signals() -> None:
    """Ignore the signals in this process: whoever started it decides. Called by every loader process as it begins.

    A launcher signals whole process trees; loader processes that died of it would take the next batch with them.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def children_ignore_stop_signals() -> Iterator[None]:
    """Let processes started inside this block inherit that: the fork server, which has no hook of its own."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
