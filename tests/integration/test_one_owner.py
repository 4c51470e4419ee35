"""A run directory is trained by one launch at a time: real commands compete for one folder."""

from __future__ import annotations

import fcntl
import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from everest_ds.commands.train import Arguments, check
from everest_ds.distributed import World
from everest_ds.recipes import get_recipe
from everest_ds.train.checkpoints.owner import OWNER
from everest_ds.train.job import LaunchOptions
from everest_ds.training_run.run import look_again
from tests.integration.interrupting import wait_until
from tests.integration.launch import compute, contents, losses, metrics, recovery_command, require_same_run, start


def test_second_launch_is_refused_by_name_and_the_first_does_not_notice(
    uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    """The first launch is suspended meanwhile, so that it cannot end too early."""
    run_dir, whole = tmp_path / "run", uninterrupted[2]
    words = recovery_command(demo_folder, run_dir)
    with start(words, processes=2) as first:
        wait_until(lambda: (run_dir / "metrics.jsonl").is_file(), first)
        members = psutil.Process(first.pid).children(recursive=True)
        for member in members:
            member.suspend()
        others = [
            compute([*words, *extra], processes=processes)
            for extra, processes in (((), 1), (("--resume", str(run_dir)), 2), (("--resume", "never"), 1))
        ]
        for member in members:
            member.resume()
        _, stderr = first.communicate(timeout=180)
    assert first.returncode == 0, stderr
    for other in others:
        assert other.returncode == 2
        (said,) = (line for line in other.stderr.splitlines() if "error" in line)
        assert said.startswith(f"everest: error: {run_dir} is being trained by pid ")
    require_same_run(run_dir, whole)
    assert [event["event"] for event in metrics(run_dir, "event")].count("start") == 1


def test_owner_that_no_rank_sees_before_they_meet_refuses_all_alike(demo_folder: Path, tmp_path: Path) -> None:
    """As on another node: the file has no owner yet, and the lock decides. Nothing is written."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (run_dir / OWNER).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = compute(recovery_command(demo_folder, run_dir), processes=2)
    assert done.returncode == 2
    assert done.stderr.count("everest: error:") == 1
    assert f"{run_dir} is being trained by another process" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(run_dir) == {OWNER: b""}


def test_study_in_a_folder_that_another_one_uses_is_refused(tmp_path: Path) -> None:
    with (tmp_path / OWNER).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = compute(["study", str(tmp_path), "--quick"])
    assert done.returncode == 2
    assert f"{tmp_path} is being trained by another process" in done.stderr
    assert contents(tmp_path) == {OWNER: b""}


def test_ranks_of_different_runs_are_refused(demo_folder: Path, tmp_path: Path) -> None:
    """As when one `srun` starts several trainings, each with its own folder."""
    ranks = tmp_path / "ranks.py"
    ranks.write_text(
        "import os, sys\nfrom everest_ds.cli import main\nsys.argv[-1] += os.environ['RANK']\nsys.exit(main())\n"
    )
    words = recovery_command(demo_folder, tmp_path / "unused", "--out", str(tmp_path / "run"))
    done = compute(words, processes=2, module=ranks)
    assert done.returncode == 2
    (said,) = (line for line in done.stderr.splitlines() if "error" in line)
    assert f"differ in --out: {tmp_path / 'run0'}, {tmp_path / 'run1'}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.py"]


@pytest.mark.slow  # the launches that are killed say the same by default
def test_killed_owner_leaves_the_run_free(demo_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*recovery_command(demo_folder, run_dir), "--run.max-steps", "4"]
    with start(words) as first:
        wait_until(lambda: (run_dir / "metrics.jsonl").is_file() and len(losses(run_dir)) >= 2, first)
        os.kill(first.pid, signal.SIGKILL)
    assert f'"pid": {first.pid}' in (run_dir / OWNER).read_text()
    assert compute(words).returncode == 0
    assert (run_dir / OWNER).read_bytes() == b""


def test_checkpoint_that_was_saved_while_a_launch_began_is_resumed(demo_folder: Path, tmp_path: Path) -> None:
    """The run ended after the second launch read the command line and before it took the lock."""
    run_dir = tmp_path / "run"
    config = get_recipe("demo")
    config = replace(config, data=replace(config.data, train_list=str(demo_folder / "train.csv"), num_workers=0))
    config = replace(config, run=replace(config.run, max_steps=1))
    world = World(rank=0, local_rank=0, size=1, local_size=1)
    job = check(Arguments(recipe="demo", config=config, options=LaunchOptions(out=run_dir)), world)
    assert job.resume.candidates == ()
    done = compute(
        [
            "pretrain",
            "demo",
            "--data.train-list",
            str(demo_folder / "train.csv"),
            "--data.num-workers",
            "0",
            "--run.max-steps",
            "1",
            "--out",
            str(run_dir),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in look_again(job, world).candidates] == ["step-00000001"]
