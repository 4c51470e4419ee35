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

GONE_WITHIN_S = 30.0  # for busy machines; an idle one needs two seconds


@dataclass(frozen=True)
class Interrupted:
    """How an interrupted command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> list[str]:
        """The project's own lines about the interruption."""
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
    """Start a command in its own process group, send SIGINT to the whole group, and wait until all have ended.

    Args:
        arguments: Arguments of `everest`.
        when: A condition, or seconds after the start.
        processes: Number of processes of the launch.
        launcher: deepspeed or torchrun, for several processes.
        send: Replaces sending SIGINT to the group.
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
    """Incomplete files below a folder."""
    return [path for path in folder.rglob("*") if path.name.endswith((".partial", ".tmp"))]
