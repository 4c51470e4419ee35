"""Stops a run on a signal: after Ctrl-C, SIGTERM or SIGUSR1 it saves at the next step boundary and ends.

Schedulers send SIGTERM or SIGUSR1 shortly before they reclaim a machine. Any rank may receive the signal.
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
    """Records the first signal; a second one ends the process at once, unless it is an echo of the first."""

    def __init__(self) -> None:
        self._signum = 0
        self._leaving = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside this block; call it in the main thread.

        After the ranks have agreed to stop, or after the last step, signals are ignored until the process ends. So
        it ends with its own exit code, whatever its launcher still sends.
        """
        mode = Mode(in_main=self._receive, in_thread=leave_at_second)
        with handling(STOP_SIGNALS, mode, ignore_after=lambda: self._leaving):
            yield
            self._leaving = True

    def agreed(self) -> signal.Signals | None:
        """Return the signal that any rank has received, or None; all ranks call this at the same step."""
        number = distributed.largest(self._signum)
        self._leaving = bool(number)
        return signal.Signals(number) if number else None

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self._signum:
            self._signum = signum
            allow_lost_reader()
