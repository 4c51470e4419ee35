"""Resuming with another number of processes and ZeRO stage: every pair of stages, in worlds of 1, 2 and 4.

There are nine parameter groups with different learning rates and weight decays, as with layer decay. At stage 3,
DeepSpeed's own loader gives all groups the values of the first, and advances a shared step counter once a group.
The demo's batch is 32 in any world, and the runs branch off in the middle of an epoch.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.integration.launch import compute, metrics

STAGES = (1, 2, 3)
BRANCH_STEP, END_STEP = 6, 16  # four steps an epoch; ten steps after the branch
RTOL = 1e-6  # measured worst of the 27 cells: 7.6e-8

NINE_GROUPS = """
import sys
from everest_ds import cli
from everest_ds.train.tasks import PretrainTask

def nine_groups(task):
    groups = {}
    for name, parameter in task.named_parameters():
        key = name.split(".")[3] if ".encoder.blocks." in name else "rest"
        key += ".plain" if parameter.ndim == 1 and key != "rest" else ""
        number = len(groups)
        fresh = {"params": [], "weight_decay": 0.05 * number, "lr_scale": 0.9**number}
        groups.setdefault(key, fresh)["params"].append(parameter)
    assert len(groups) == 9, len(groups)
    return list(groups.values())

PretrainTask.parameter_groups = nine_groups
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "nine_groups.py"
    path.write_text(NINE_GROUPS)
    return path


def run(script: Path, world: int, stage: int, out: Path, *words: str | Path) -> str:
    """Run the demo with nine groups; return what it printed."""
    flags = ["--out", str(out), "--ds-config", str(REPOSITORY / "ds_configs" / f"zero{stage}.json")]
    flags += ["--run.max-steps", str(END_STEP), "--run.log-every-steps", "1", "--data.num-workers", "0"]
    flags += ["--precision", "fp32", "--batch.micro-size", "8", "--data.num-frames", "8", *map(str, words)]
    done = compute(["pretrain", "demo", *flags], processes=world, module=script)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def uninterrupted(script: Path, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A complete run on two processes at each stage, made at first use."""

    class Runs(dict[int, Path]):
        def __missing__(self, stage: int) -> Path:
            out = tmp_path_factory.mktemp("runs") / f"zero{stage}"
            saving = ["--run.save-every-steps", BRANCH_STEP, "--data.train-list", demo_folder / "train.csv"]
            run(script, 2, stage, out, *map(str, saving))
            self[stage] = out
            return out

    return Runs()


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(run_dir)}


# By default one cell for each fault of DeepSpeed's loader; all cells with --slow.
DEFAULT_CELLS = {(2, 1, 3), (3, 1, 2)}
CELLS = [
    pytest.param(*cell, marks=() if cell in DEFAULT_CELLS else pytest.mark.slow)
    for cell in ((was, world, stage) for was in STAGES for world in (1, 2, 4) for stage in STAGES)
]


@pytest.mark.parametrize(("was", "world", "stage"), CELLS)
def test_run_goes_on_in_another_world_and_stage(
    was: int, world: int, stage: int, uninterrupted: dict[int, Path], script: Path, demo_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    source = uninterrupted[was] / "checkpoints" / f"step-{BRANCH_STEP:08d}"
    named = ["--resume", source, "--data.train-list", demo_folder / "train.csv"]
    said = run(script, world, stage, tmp_path / "run", *map(str, named))
    then_and_now = f"2 processes at ZeRO-{was} then, {world} at ZeRO-{stage} now"
    assert f"step {BRANCH_STEP}, epoch 1, {BRANCH_STEP * 32} samples; {then_and_now}" in said
    after = {step: loss for step, loss in losses(uninterrupted[was]).items() if step > BRANCH_STEP}
    branch = losses(tmp_path / "run")
    assert len(after) == 10
    assert branch.keys() == after.keys()
    worst = max(abs(branch[step] / after[step] - 1) for step in after)
    print(f"CELL {was} -> {world} x {stage}: {worst:.2e}")
    if (world, stage) == (2, was):
        assert branch == after
    else:
        assert worst < RTOL
        assert (source.parent / f"universal-{source.name}" / "complete.json").is_file()


@pytest.mark.slow
def test_zero_0_in_float32_goes_on_in_any_world(
    uninterrupted: dict[int, Path], script: Path, demo_folder: Path, tmp_path: Path
) -> None:
    """Every process has all states, so nothing is converted."""
    after = {step: loss for step, loss in losses(uninterrupted[0]).items() if step > BRANCH_STEP}
    source = uninterrupted[0] / "checkpoints" / f"step-{BRANCH_STEP:08d}"
    for world in (1, 4):
        named = ["--resume", str(source), "--data.train-list", str(demo_folder / "train.csv")]
        run(script, world, 0, tmp_path / str(world), *named)
        branch = losses(tmp_path / str(world))
        assert max(abs(branch[step] / after[step] - 1) for step in after) < RTOL
    assert not list(source.parent.glob("universal-*"))


@pytest.mark.slow
def test_run_goes_on_with_eight_processes_and_comes_back(
    uninterrupted: dict[int, Path], script: Path, demo_folder: Path, tmp_path: Path
) -> None:
    """2 processes at ZeRO-2, then 8 at ZeRO-3, then 2 at ZeRO-2 again, in one run directory."""
    out = tmp_path / "run"
    stops = [("2", 6), ("8", 9), ("2", 16)]
    for world, until in stops:
        words = ["--data.train-list", str(demo_folder / "train.csv"), "--run.max-steps", str(until)]
        run(script, int(world), 3 if world == "8" else 2, out, *words, "--batch.micro-size", "4")
    branch, whole = losses(out), losses(uninterrupted[2])
    assert branch.keys() == whole.keys()
    worst = max(abs(branch[step] / whole[step] - 1) for step in whole)
    print(f"8 processes in between: {worst:.2e}")
    assert worst < RTOL
