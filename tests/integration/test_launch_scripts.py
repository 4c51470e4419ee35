"""The cluster scripts of launch/ on one machine: two nodes of a hostfile, and a Slurm made of two small scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.integration.launch import cpu_environment, free_port, metrics

SRUN = """#!/bin/bash
# Starts the tasks of a step here; its exit code is the highest of theirs.
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
done
worst=0
for job in $(jobs -p); do
  wait "$job"; code=$?
  ((code > worst)) && worst=$code
done
exit $worst
"""

SCONTROL = """#!/bin/bash
case $1 in
  show) echo 127.0.0.1 ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


def short_run(demo_folder: Path) -> list[str]:
    words = ["--precision", "fp32", "--run.log-every-steps", "1", "--data.num-workers", "0"]
    return [*words, "--run.max-steps", "8"]


@pytest.mark.slow
def test_slurm_script_requeues_a_stopped_run_and_goes_on(demo_folder: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = cpu_environment(
        SLURM_JOB_ID=str(free_port()), SLURM_NTASKS="2", SLURM_NNODES="1", SLURM_JOB_NODELIST="here",
        REQUEUED=str(tmp_path / "requeued"),
    )  # fmt: skip
    environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
    run_dir = tmp_path / "run"
    words = ["demo", str(demo_folder / "train.csv"), str(run_dir), *short_run(demo_folder)]
    command = ["bash", "launch/slurm.sbatch", *words]
    codes = []
    for attempt in range(2):
        with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL) as job:
            while attempt == 0 and job.poll() is None:
                if (run_dir / "metrics.jsonl").is_file() and len(metrics(run_dir)) >= 3:
                    for task in psutil.Process(job.pid).children(recursive=True):
                        if "everest_ds" in task.cmdline() and task.name().startswith("python"):
                            task.send_signal(signal.SIGUSR1)
                    break
                time.sleep(0.02)
            codes.append(job.wait(timeout=180))
    assert codes == [75, 0]
    assert (tmp_path / "requeued").read_text().splitlines() == [environment["SLURM_JOB_ID"]]
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 9))
    assert [line["event"] for line in metrics(run_dir, "event")] == [
        "start", "checkpoint", "stopped", "memory", "resume", "checkpoint", "memory", "end",
    ]  # fmt: skip


@pytest.mark.slow
def test_multinode_script_joins_two_nodes_of_a_hostfile(demo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    run_dir = tmp_path / "run"
    words = [str(tmp_path / "hostfile"), "demo", str(demo_folder / "train.csv"), str(run_dir)]
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            ["bash", str(REPOSITORY / "launch" / "multinode.sh"), *words, *short_run(demo_folder)],
            env=cpu_environment(NODE_RANK=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=180) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert metrics(run_dir, "event")[0]["world_size"] == 2
    assert len(metrics(run_dir)) == 8
