"""A rank that hangs, is slow, or has a flipped bit is named, and no step is lost."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from everest_ds.stacks import EXIT_HUNG
from tests.integration.launch import SMALL, compute, ds_config, flags, metrics, recovery_command, require_same_run
from tests.integration.scanning import scan

PATIENCE = ("--run.hang-after-s", "2")


def run_at_fault(
    words: list[str], how: str, *, rank: int = 1, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    return compute(
        words,
        processes=processes,
        module="tests.integration.run_hanging",
        environment={"HOW": how, "AT_FAULT": str(rank)},
        timeout_s=120,
    )


def report_of(run_dir: Path) -> tuple[str, Path]:
    (report,) = (run_dir / "hangs").glob("*/report.txt")
    return report.read_text(), report.parent


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("stopped", "gives no sign of life, stopped"),
        ("skip", "computing gradients after step 6, waits in reduce_scatter"),
        pytest.param("python", "computing gradients after step 5, is in loop", marks=pytest.mark.slow),
        pytest.param("loader", "waiting for clips after step 5, is in", marks=pytest.mark.slow),
        pytest.param("lock", "gives no sign of life, sleeping", marks=pytest.mark.slow),
    ],
)
def test_rank_that_hangs_is_named_and_no_step_is_lost(
    way: str, said: str, uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = recovery_command(demo_folder, run_dir)
    done = run_at_fault([*words, *PATIENCE], way)
    assert done.returncode == EXIT_HUNG, done.stderr
    report, folder = report_of(run_dir)
    head, *lines = report.splitlines()
    assert "s; rank 1: " in head, report
    assert any(line.startswith("rank 1") and said in line for line in lines), report
    assert report in done.stderr
    assert done.stderr.count("everest: ") == 1
    assert "Traceback" not in done.stderr
    for rank in range(2):
        assert "in _train" in (folder / f"rank-{rank:05d}.txt").read_text(), rank
    (event,) = (event for event in metrics(run_dir, "event") if event["event"] == "hang")
    assert event["ranks"] == [1]
    done = compute(words, processes=2)
    assert done.returncode == 0, done.stderr
    require_same_run(run_dir, uninterrupted[2])


@pytest.mark.parametrize(
    ("stage", "processes", "precision"),
    [
        (2, 3, "fp32"),
        pytest.param(0, 2, "fp32", marks=pytest.mark.slow),
        pytest.param(1, 3, "bf16", marks=pytest.mark.slow),
        pytest.param(3, 3, "fp32", marks=pytest.mark.slow),
    ],
)
def test_flipped_bit_ends_the_run_before_it_is_saved(
    stage: int, processes: int, precision: str, demo_folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = recovery_command(demo_folder, run_dir, "--precision", precision, stage=stage)
    words += ["--batch.global-size", "12", "--batch.micro-size", "2", *SMALL, "--run.save-every-steps", "4"]
    done = run_at_fault(words, "bit", processes=processes)
    assert done.returncode == 2, done.stderr
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("everest: error:"))
    who = "rank 1 computes with other weights" if processes > 2 else "ranks 0, 1 compute with different weights"
    assert f"{who} than its peers at step 6" in said or f"{who} at step 6" in said
    assert "They agreed up to step-00000004 in" in said
    (event,) = (event for event in metrics(run_dir, "event") if event["event"] == "weights_differ")
    assert event["ranks"] == ([1] if processes > 2 else [0, 1])
    assert not (run_dir / "checkpoints" / "step-00000008").exists()
    assert compute(words, processes=processes).returncode == 0


@pytest.mark.slow
def test_slow_rank_is_named_in_the_record(demo_folder: Path, tmp_path: Path) -> None:
    words = [*flags(demo_folder, tmp_path / "run", *SMALL, steps=50), "--batch.global-size", "4"]
    words += ["--batch.micro-size", "2", "--run.log-every-steps", "50"]
    done = run_at_fault(words, "slow")
    assert done.returncode == 0, done.stderr
    events = [event for event in metrics(tmp_path / "run", "event") if event["event"] == "slow_rank"]
    assert [(event["rank"], event["step"]) for event in events] == [(1, 50)]
    assert events[0]["own_ms"] - events[0]["peers_ms"] > 25


WAITS_ALONE = """
import os, time
from everest_ds import distributed
world = distributed.World.from_environment()
distributed.start(world)
distributed.barrier()
distributed.set_timeout(1.0)
if world.is_main:
    began = time.monotonic()
    try:
        distributed.largest(1)
    except RuntimeError as error:
        print("ended after", round(time.monotonic() - began), "s", flush=True)
else:
    time.sleep(4)
os._exit(0)
"""


def test_collective_that_a_peer_does_not_join_ends_in_time(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(WAITS_ALONE)
    done = compute([], processes=2, module=program)
    assert "ended after 1 s" in done.stdout, done.stderr


@pytest.mark.slow
def test_watching_costs_a_few_hundredths_of_a_step() -> None:
    """Measured in this thread's CPU time, which other processes hardly change; the checksum took 1.3 %."""
    for line in scan("watch", "tiny", 4, 30, ds_config("zero2"), processes=2):
        step = line["compute"][1] + line["update"][1]
        assert line["checksum"][1] + line["phases"][1] < 0.05 * step, line
        assert line["signs"][1] < 20, line
