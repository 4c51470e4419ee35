from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from everest_ds.launchers import find_launchers

GONE_WITHIN_S = 10.0
RANK = """
import os, subprocess, sys, time
from everest_ds.launchers import end_with_launchers
end_with_launchers(is_first=True)
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(300)
"""
LAUNCHER = "import subprocess, sys; subprocess.run(sys.argv[1:])"


def launch_by(program: Path, *between: str) -> subprocess.Popen[str]:
    """Start a rank from a Python program with a given name, optionally with a shell in between."""
    program.write_text(LAUNCHER)
    command = [sys.executable, str(program), *between, sys.executable, "-c", RANK]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def members_of(launcher: subprocess.Popen[str]) -> list[int]:
    assert launcher.stdout is not None
    return [int(pid) for pid in launcher.stdout.readline().split()]


@pytest.mark.parametrize(
    ("name", "between"), [("torchrun", ()), ("deepspeed", ("bash", "-c", '"$@"; exit 1', "bash")), ("mpirun", ())]
)
def test_rank_and_what_it_has_started_end_with_the_launcher(
    name: str, between: tuple[str, ...], tmp_path: Path
) -> None:
    launcher = launch_by(tmp_path / name, *between)
    members = members_of(launcher)
    launcher.kill()
    _, stderr = launcher.communicate(timeout=GONE_WITHIN_S)
    assert stderr.startswith("everest: the launcher has ended, so this process ends too")
    assert stderr.count("\n") == 1
    until = time.monotonic() + GONE_WITHIN_S
    while alive(members):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_process_that_nobody_launched_goes_on_without_the_one_above(tmp_path: Path) -> None:
    """As after `nohup everest ... &`, when the shell has ended."""
    launcher = launch_by(tmp_path / "anything")
    members = members_of(launcher)
    launcher.kill()
    launcher.wait()
    time.sleep(3)  # a rank notices its launcher's end within two seconds
    try:
        assert alive(members) == members
    finally:
        for pid in members:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("words", "is_launcher"),
    [
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e"], True),
        (["/usr/bin/python3.11", "/opt/bin/deepspeed", "--num_gpus", "2"], True),
        (["python", "-m", "torch.distributed.run", "-m", "everest_ds", "pretrain"], True),
        (["mpirun", "-n", "2", "everest"], True),
        (["python", "-m", "everest_ds", "study", "DIR"], True),
        (["python", "/opt/bin/everest", "benchmark", "step"], True),
        (["python", "-m", "everest_ds", "pretrain", "demo"], False),
        (["python", "-m", "pytest", "-k", "deepspeed"], False),
        (["vim", "deepspeed"], False),
        (["bash", "-c", "deepspeed --num_gpus 2 x"], False),
        ([], False),
    ],
)
def test_launchers_are_known_by_their_words(
    words: list[str], is_launcher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = {30: 20, 20: 10, 10: 1, 1: 0}
    monkeypatch.setattr("everest_ds.launchers.parent_of", parents.__getitem__)
    monkeypatch.setattr("everest_ds.launchers.words_of", lambda pid: words if pid == 10 else ["bash"])
    monkeypatch.setattr("everest_ds.launchers._was_left", lambda pid: False)
    assert find_launchers(30) == ([20, 10] if is_launcher else [])


@pytest.mark.parametrize(
    ("first_process", "mark", "lost"),
    [("init", "TORCHELASTIC_RUN_ID", [0]), ("python3", "TORCHELASTIC_RUN_ID", []), ("init", "OTHER", [])],
)
def test_rank_of_torchrun_below_the_first_process_was_left(
    first_process: str, mark: str, lost: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(mark, "none")
    monkeypatch.setattr("everest_ds.launchers.parent_of", {30: 1, 1: 0}.__getitem__)
    monkeypatch.setattr("everest_ds.launchers.words_of", lambda pid: [first_process])
    monkeypatch.setattr(os, "getsid", lambda pid: pid)
    assert find_launchers(30) == lost


def test_rank_whose_launcher_ended_before_it_looked_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = {30: 20, 20: 1, 1: 0}
    monkeypatch.setattr("everest_ds.launchers.parent_of", parents.__getitem__)
    monkeypatch.setattr("everest_ds.launchers._was_left", lambda pid: pid == 20)
    monkeypatch.setattr(os, "getsid", lambda pid: 5)
    node = ["python", "-u", "-m", "deepspeed.launcher.launch"]
    monkeypatch.setattr("everest_ds.launchers.words_of", lambda pid: node if pid == 20 else ["init"])
    assert find_launchers(30) == [20, 0]
