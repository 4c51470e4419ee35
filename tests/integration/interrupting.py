"""Ctrl-C as a terminal sends it: SIGINT to every process of the foreground group."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.integration.launch import start

GONE_WITHIN_S = 30.0  # machines are busy; on an idle one it takes two seconds


@dataclass(frozen=True)
class Interrupted:
    """How an interrupted command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> list[str]:
        """What the project has said of the interruption."""
        return [line for line in self.stderr.splitlines() if line.startswith("everest: ")]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.005)


def interrupt(
    arguments: Sequence[str | Path],
    when: Callable[[], bool] | float,
    *,
    processes: int = 1,
    launcher: str = "deepspeed",
    send: Callable[[subprocess.Popen[str]], None] | None = None,
) -> Interrupted:
    """Start a command in a process group of its own, send SIGINT to all of the group, and wait for all to end.

    Args:
        arguments: Of `everest`.
        when: A condition, or seconds after the start.
        processes: Of the launch.
        launcher: deepspeed or torchrun, for several processes.
        send: Sends something else.
    """
    with start(arguments, processes=processes, launcher=launcher, own_group=True) as process:
        wait_until(when, process) if callable(when) else time.sleep(when)
        assert process.poll() is None, process.communicate()
        descendants = psutil.Process(process.pid).children(recursive=True)
        if send is None:
            os.killpg(process.pid, signal.SIGINT)
        else:
            send(process)
        stdout, stderr = process.communicate(timeout=120)
        _, alive = psutil.wait_procs(descendants, timeout=GONE_WITHIN_S)
    assert not alive, [member.cmdline() for member in alive]
    return Interrupted(process.returncode, stdout, stderr)


def partial_files(folder: Path) -> list[Path]:
    """Files below a folder that are not whole."""
    return [path for path in folder.rglob("*") if path.name.endswith((".partial", ".tmp"))]
