"""Requests to stop: after Ctrl-C, SIGTERM or SIGUSR1 a run saves at the next step boundary and ends.

Schedulers send SIGTERM or SIGUSR1 shortly before they take a machine away. Any rank may receive a signal.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from everest_ds import distributed
from everest_ds.interrupts import Mode, allow_lost_reader, handling, leave_at_second

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# The conventional code of "a temporary failure, try again" (EX_TEMPFAIL of sysexits.h).
EXIT_STOPPED = 75


class StopRequest:
    """Notes the first signal; a second one, unless it is an echo of the first, ends the process at once."""

    def __init__(self) -> None:
        self._signum = 0
        self._leaving = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside this block; only the main thread may.

        Once the ranks have agreed to stop, signals are ignored for good: a process that has saved ends with its own
        exit code, whatever its launcher still sends. So does one that has taken its last step.
        """
        mode = Mode(in_main=self._receive, in_thread=leave_at_second)
        with handling(STOP_SIGNALS, mode, ignore_after=lambda: self._leaving):
            yield
            self._leaving = True

    def agreed(self) -> signal.Signals | None:
        """Return the signal that any rank has received; all ranks call this at the same step."""
        number = distributed.largest(self._signum)
        self._leaving = bool(number)
        return signal.Signals(number) if number else None

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self._signum:
            self._signum = signum
            allow_lost_reader()
