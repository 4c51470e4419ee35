"""A rank that hangs: the run ends by itself, names that rank, leaves the stacks of all, and resumes bitwise."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from everest_ds.stacks import EXIT_HUNG
from tests.integration.launch import compute, metrics, recovery_command, require_same_run

PATIENCE = ("--run.hang-after-s", "2")


def run_hanging(
    words: list[str], way: str, *, rank: int = 1, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    return compute(
        [*words, *PATIENCE],
        processes=processes,
        module="tests.integration.run_hanging",
        environment={"HANG": way, "HANGING_RANK": str(rank)},
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
    done = run_hanging(words, way)
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
