"""After a launcher or a rank is killed, no process of the launch is left ten seconds later, and a restart works."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.integration.interrupting import wait_until
from tests.integration.launch import compute, cpu_environment, losses, recovery_command, require_same_run, start
from tests.integration.test_recovery import ranks_of, steps_recorded

GONE_WITHIN_S = 10.0


def victim_of(process: subprocess.Popen[str], name: str) -> psutil.Process:
    launcher = psutil.Process(process.pid)
    return {"launcher": launcher, "node": launcher.children()[0]}.get(name) or ranks_of(process)[1]


@pytest.mark.parametrize(
    ("launcher", "victim"),
    [
        ("deepspeed", "launcher"),
        pytest.param("deepspeed", "node", marks=pytest.mark.slow),
        pytest.param("deepspeed", "rank", marks=pytest.mark.slow),
        pytest.param("torchrun", "launcher", marks=pytest.mark.slow),
        pytest.param("torchrun", "rank", marks=pytest.mark.slow),
    ],
)
def test_nothing_outlives_a_launch_and_the_next_start_resumes_bitwise(
    launcher: str, victim: str, uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    run_dir, whole = tmp_path / "run", uninterrupted[2]
    words = recovery_command(demo_folder, run_dir, "--data.num-workers", "2")
    with start(words, processes=2, launcher=launcher) as process:
        wait_until(lambda: steps_recorded(run_dir) >= 3, process)
        members = psutil.Process(process.pid).children(recursive=True)
        assert len(members) > 6  # node launcher, ranks, and the loader processes of each
        victim_of(process, victim).kill()
        _, left = psutil.wait_procs(members, timeout=GONE_WITHIN_S)
        assert left == []
        _, stderr = process.communicate(timeout=GONE_WITHIN_S)
    assert stderr.count("everest: the launcher has ended") == (victim != "rank")
    done = compute([*words, "--data.num-workers", "0"], processes=2)
    assert done.returncode == 0, done.stderr
    assert len(losses(run_dir)) == len(losses(whole))
    require_same_run(run_dir, whole)


def test_taken_port_is_one_sentence_and_nothing_is_written(demo_folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = recovery_command(demo_folder, tmp_path / "run")
        done = compute(words, processes=2, environment={"MASTER_PORT": str(port)})
    assert done.returncode == 2, done.stderr
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("everest: error:"))
    assert f"port {port} of 127.0.0.1 is used by another process" in said
    assert "--master_port" in said
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"MASTER_PORT": ""}, "2 processes were started without MASTER_PORT."),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "without MASTER_ADDR and MASTER_PORT."),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a port"),
        ({"MASTER_PORT": "free"}, "MASTER_PORT=free is not a port"),
    ],
)
def test_place_to_meet_that_is_none_is_refused(
    given: dict[str, str], expected: str, demo_folder: Path, tmp_path: Path
) -> None:
    done = compute(recovery_command(demo_folder, tmp_path / "run"), processes=2, environment=given)
    assert done.returncode in (2, -9)  # the other rank is killed if it has not ended by then
    assert done.stderr.count("everest: error:") == 1
    assert expected in done.stderr


def test_tasks_of_srun_are_one_training(uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path) -> None:
    """Slurm is replaced by a shell that sets each task's Slurm variables, and none of a launcher."""
    run_dir, whole = tmp_path / "run", uninterrupted[2]
    words = recovery_command(demo_folder, run_dir)
    common = {"SLURM_JOB_ID": "12345", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    done = srun(words, common)
    assert done.returncode == 0, done.stderr
    require_same_run(run_dir, whole)


def srun(words: list[str], common: dict[str, str]) -> subprocess.CompletedProcess[str]:
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "everest_ds", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
            env=cpu_environment(**common, SLURM_PROCID=str(task), SLURM_LOCALID=str(task)),
        )
        for task in range(2)
    ]  # fmt: skip
    said = [task.communicate(timeout=180) for task in tasks]
    worst = max(task.returncode for task in tasks)
    return subprocess.CompletedProcess(words, worst, *map("".join, zip(*said, strict=True)))
