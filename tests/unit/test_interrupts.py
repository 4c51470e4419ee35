from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from everest_ds.interrupts import deferred

# `ready()` signals the test. While the main thread is in C code, it runs no Python signal handler.
BEGIN = """
import ctypes, os, sys, time
from everest_ds import interrupts
interrupts.begin(lambda: os.write(2, b"interrupted\\n"))
def ready(): os.write(1, b"ready\\n")
def stay_in_c():
    lock = ctypes.create_string_buffer(64)  # a mutex that is locked twice is never had, and no signal ends that
    for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(lock)
"""

# After this time a process that is ready has entered C code.
IN_C_S = 0.5
# A second signal within this time repeats the first request, without a launcher and with one.
ECHO_S = {"alone": 0.5, "launched": 2.0}


def run_and_interrupt(
    program: str, *, at_s: tuple[float, ...] = (0.0,), folder: Path | None = None, launched: bool = False
) -> tuple[int, str, float]:
    """Run a program, send SIGINT ``at_s`` after it is ready; return exit code, stderr and seconds until its end."""
    command = [sys.executable, "-c", BEGIN + program]
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    environment |= {"LOCAL_RANK": "0"} if launched else {}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        for moment_s in at_s:
            time.sleep(max(0.0, began + moment_s - time.monotonic()))
            process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        return process.returncode, stderr, time.monotonic() - began - at_s[-1]


def test_interrupt_leaves_at_once_with_one_line_also_out_of_c_code() -> None:
    code, stderr, took_s = run_and_interrupt("ready(); stay_in_c()", at_s=(IN_C_S,))
    assert (code, stderr) == (130, "interrupted\n")
    assert took_s < 5


def test_unwinding_raises_keyboard_interrupt_once_and_lets_the_way_out_be() -> None:
    program = """
interrupts.unwind()
try:
    ready(); time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # the second signal comes here
    print("cleaned up", interrupts.was_raised(), file=sys.stderr)
"""
    code, stderr, _ = run_and_interrupt(program, at_s=(0.0, 0.2))
    assert (code, stderr) == (0, "cleaned up True\n")


@pytest.mark.parametrize(
    "wait",
    [
        "interrupts.unwind()\nready(); stay_in_c()",
        "from everest_ds.train.signals import StopRequest\nwith StopRequest().listening():\n  ready(); stay_in_c()",
        "interrupts.finish()\nready(); stay_in_c()",
    ],
    ids=["command", "training", "end"],
)
def test_second_interrupt_ends_a_process_that_is_stuck_in_c_code(wait: str) -> None:
    code, stderr, took_s = run_and_interrupt(wait, at_s=(IN_C_S, IN_C_S + ECHO_S["alone"] + 0.5))
    assert (code, stderr) == (130, "")
    assert took_s < 5


def test_second_interrupt_under_a_launcher_is_the_first_again_for_longer() -> None:
    program = "interrupts.finish()\nready(); stay_in_c()"
    moments_s = (IN_C_S, IN_C_S + 1.2, IN_C_S + ECHO_S["launched"] + 0.5)
    code, stderr, took_s = run_and_interrupt(program, at_s=moments_s, launched=True)
    assert (code, stderr) == (130, "")
    assert 0 <= took_s < 5  # alive when the third signal was sent


def test_interrupt_that_python_drops_comes_again() -> None:
    program = """
interrupts.unwind()
class Dropping:
    def __del__(self):
        ready(); time.sleep(5)
try:
    Dropping(); time.sleep(30)
except KeyboardInterrupt:
    print("raised", file=sys.stderr)
"""
    code, stderr, took_s = run_and_interrupt(program)
    assert (code, stderr) == (0, "raised\n")
    assert took_s < 4


def test_interrupt_within_an_import_leaves_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import os, time\nos.write(1, b'ready\\n')\ntime.sleep(30)\n")
    program = "interrupts.unwind()\ntry:\n  import slow\nexcept BaseException:\n  print('unwound', file=sys.stderr)"
    code, stderr, _ = run_and_interrupt(program, folder=tmp_path)
    assert (code, stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("begin", ["", "interrupts.unwind()"], ids=["at once", "cleaning up"])
def test_what_a_process_has_started_ends_with_it(begin: str, tmp_path: Path) -> None:
    """A child and a grandchild, which would both outlive the process."""
    nap = f"120.{os.getpid()}"  # a unique duration identifies the process
    child = f"import subprocess, os; subprocess.Popen(['sleep', '{nap}']); os.write(1, b'ready\\n'); os.wait()"
    program = f"""
import subprocess
{begin}
child = subprocess.Popen([sys.executable, "-c", {child!r}])
open("pid", "w").write(str(child.pid))
with interrupts.ending_with_us(child):
    child.wait()
"""
    (tmp_path / "pid").touch()
    run_and_interrupt(program, folder=tmp_path)
    pid = int((tmp_path / "pid").read_text())
    left = [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE
        and (process.pid == pid or process.info["cmdline"] == ["sleep", nap])
    ]
    assert left == []


def test_deferred_interrupt_is_raised_after_the_block() -> None:
    program = """
interrupts.unwind()
try:
    with interrupts.deferred():
        ready(); time.sleep(1)
        print("whole", file=sys.stderr)
    print("not reached", file=sys.stderr)
except KeyboardInterrupt:
    print("raised", file=sys.stderr)
"""
    assert run_and_interrupt(program)[:2] == (0, "whole\nraised\n")


def test_deferring_changes_nothing_in_a_process_of_somebody_else() -> None:
    with deferred():
        handler = signal.getsignal(signal.SIGINT)
    assert handler is signal.default_int_handler
