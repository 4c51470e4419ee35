from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from everest_ds import interrupts
from everest_ds.train.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_first_signal_is_noted_and_its_echo_ignored(
    signum: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "SAME_REQUEST_S", 60.0)  # a busy machine may delay a thread for long
    stop = StopRequest()
    with stop.listening():
        assert stop.agreed() is None
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)
        assert stop.agreed() == signum
    os.kill(os.getpid(), signum)  # after the request, further signals of a launcher are ignored


def test_signals_are_ignored_after_the_last_step_and_as_before_after_a_failure() -> None:
    with contextlib.suppress(RuntimeError), StopRequest().listening():
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)  # a late signal does not change the exit code 0 of a finished run


SECOND = """
import os, signal, time
from everest_ds.interrupts import SAME_REQUEST_S
from everest_ds import interrupts
from everest_ds.train.signals import StopRequest
with StopRequest().listening():
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(SAME_REQUEST_S + 0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)  # another thread ends the process
    print("still here")
"""


def test_second_signal_ends_the_process_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == ""
