"""Start the project: with the real launchers as users do, or in forks of a warm process if only numbers matter."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.conftest import REPOSITORY
from tests.integration.forking import run_forked

BIN = Path(sys.executable).parent
RECOVERY_STEPS = 12


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
    arguments: Sequence[str | Path],
    *,
    processes: int = 1,
    prefix: Sequence[str] = (),
    launcher: str = "deepspeed",
    own_group: bool = False,
    one_pipe: bool = False,
) -> subprocess.Popen[str]:
    """Start `everest ARGUMENTS`, through the deepspeed launcher or torchrun when there are several processes.

    A prefix is a command that runs the one after it. A process group of its own is what Ctrl-C would reach. With
    one pipe, stderr is merged into stdout.
    """
    if processes == 1:
        command = [sys.executable, "-m", "everest_ds"]
    elif launcher == "torchrun":
        command = [str(BIN / "torchrun"), "--nproc-per-node", str(processes), "--master-port", str(free_port())]
        command += ["-m", "everest_ds"]
    else:
        options = ["--no_local_rank", "--num_gpus", str(processes), "--master_port", str(free_port())]
        command = [str(BIN / "deepspeed"), *options, "--module", "everest_ds"]
    return subprocess.Popen(
        [*prefix, *command, *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if one_pipe else subprocess.PIPE,
        text=True,
        env=cpu_environment(),
        cwd=REPOSITORY,
        start_new_session=own_group,
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


def compute(
    arguments: Sequence[str | Path],
    *,
    processes: int = 1,
    module: str | Path = "everest_ds",
    timeout_s: float = 300,
    folder: Path = REPOSITORY,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `everest ARGUMENTS`, or another module or file, to its end in forks of a warm process; see `forking`.

    Use it to test what a run computes and refuses; use `launch` to test launching. As under a launcher, the ranks
    have a common parent.
    """
    shared = {"WORLD_SIZE": str(processes), "LOCAL_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(processes)]
    ranks = [rank | dict(environment or {}) for rank in (ranks if processes > 1 else [{}])]
    start = [str(module)] if isinstance(module, Path) else ["-m", module]
    return run_forked([*start, *map(str, arguments)], ranks=ranks, folder=folder, timeout_s=timeout_s)


def metrics(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind of RUN/metrics.jsonl."""
    text = (run_dir / "metrics.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()  # the last line may still be being written
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


# A model and clips whose step takes a third of the demo's time.
SMALL = ("--model.size", "nano", "--data.num-frames", "8")


PICTURES = "--run.pictures-every-steps"


def flags(demo_folder: Path, out: Path, *extra: str, steps: int = 20) -> list[str]:
    """Arguments of a short demo run that logs every step and draws no pictures."""
    words = ["pretrain", "demo", "--data.train-list", str(demo_folder / "train.csv"), "--out", str(out)]
    words += ["--run.max-steps", str(steps), "--run.log-every-steps", "1", "--data.num-workers", "0"]
    return [*words, "--precision", "fp32", *([] if PICTURES in extra else [PICTURES, "0"]), *extra]


def ds_config(name: str) -> str:
    """The path of a file of ds_configs/."""
    return str(REPOSITORY / "ds_configs" / f"{name}.json")


def losses(run_dir: Path) -> list[float]:
    """The loss of every recorded step."""
    return [line["loss"] for line in metrics(run_dir)]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def recovery_command(demo_folder: Path, out: Path, *extra: str, stage: int = 2) -> list[str]:
    """Arguments of a run of twelve steps (three epochs) that saves every second step."""
    words = ["--run.save-every-steps", "2", "--ds-config", ds_config(f"zero{stage}"), *extra]
    return flags(demo_folder, out, *words, steps=RECOVERY_STEPS)


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint of ZeRO-0 to 2."""
    shard = run_dir / "checkpoints" / f"step-{step:08d}" / "mp_rank_00_model_states.pt"
    return torch.load(shard, weights_only=False)["module"]


def require_same_run(run_dir: Path, expected: Path) -> None:
    """Require bitwise identical losses and weights."""
    assert losses(run_dir) == losses(expected)
    ours, theirs = weights(run_dir, RECOVERY_STEPS), weights(expected, RECOVERY_STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def run_to_the_end(arguments: list[str]) -> None:
    """Run on two processes and require success."""
    done = compute(arguments, processes=2)
    assert done.returncode == 0, done.stderr
