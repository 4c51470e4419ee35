"""Starts the project as users do: in processes of their own, with the real launchers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY

BIN = Path(sys.executable).parent


def cpu_environment(**extra: str) -> dict[str, str]:
    """The environment of a launch on the CPU, with one thread a process."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return environment | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **extra}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    arguments: Sequence[str | Path], *, processes: int = 1, prefix: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start `everest ARGUMENTS`, through the deepspeed launcher when there are several processes.

    A prefix is a command that runs the one that follows it.
    """
    if processes == 1:
        command = [sys.executable, "-m", "everest_ds"]
    else:
        launcher = ["--no_local_rank", "--num_gpus", str(processes), "--master_port", str(free_port())]
        command = [str(BIN / "deepspeed"), *launcher, "--module", "everest_ds"]
    return subprocess.Popen(
        [*prefix, *command, *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cpu_environment(),
        cwd=REPOSITORY,
    )


def launch(
    arguments: Sequence[str | Path], *, processes: int = 1, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run `everest ARGUMENTS` to its end."""
    with start(arguments, processes=processes, prefix=prefix) as process:
        try:
            stdout, stderr = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def metrics(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind of RUN/metrics.jsonl."""
    text = (run_dir / "metrics.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()  # a line may be on its way
    return [line for line in map(json.loads, lines) if line["kind"] == kind]
