"""Budgets and frame selection in whole runs: two processes with different numbers of tokens against one with all.

Measured worst relative difference of loss and gradient norm over eight steps of the demo in float32: 3.7e-7.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everest_ds.config import PretrainConfig
from everest_ds.config.file import load_config
from tests.integration.launch import SMALL, compute, ds_config, flags, losses, metrics

RTOL = 1e-6
STEPS = 8
BUDGETS = {
    "batch": ["--selection.budget", "batch", "--selection.ceiling", "0.9"],
    "threshold": [
        "--selection.budget",
        "threshold",
        "--selection.floor",
        "0.2",
        "--selection.quantile-decay",
        "0.8",
    ],
    "frames": ["--selection.budget", "batch", "--selection.alpha", "1.5", "--data.sampling-stride", "1"],
}


@pytest.fixture(scope="module")
def whole(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process with all clips, by budget, made at first use."""

    class Runs(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            out = tmp_path_factory.mktemp("whole") / name
            words = [*SMALL, "--ds-config", ds_config("zero0"), "--batch.micro-size", "32", *BUDGETS[name]]
            done = compute(flags(demo_folder, out, *words, steps=STEPS))
            assert done.returncode == 0, done.stderr
            self[name] = out
            return out

    return Runs()


@pytest.mark.parametrize(("name", "stage"), [("batch", 2), ("threshold", 3), ("frames", 3)])
def test_two_processes_with_unequal_tokens_equal_one(
    name: str, stage: int, whole: dict[str, Path], demo_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = [*SMALL, "--ds-config", ds_config(f"zero{stage}"), "--batch.micro-size", "16", *BUDGETS[name]]
    done = compute(flags(demo_folder, out, *words, steps=STEPS), processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(whole[name]), rel=RTOL)
    norms, expected = ([line["grad_norm"] for line in metrics(run)] for run in (out, whole[name]))
    assert norms == pytest.approx(expected, rel=RTOL)
    both = (losses(out), losses(whole[name])), (norms, expected)
    worst = max(abs(a / b - 1) for ours, theirs in both for a, b in zip(ours, theirs, strict=True))
    print(f"{name}: {worst:.1e}")


def test_tokens_are_as_announced(whole: dict[str, Path]) -> None:
    """With `batch` every total is exact; with `threshold` it depends on the content, within its bound."""
    config = load_config(whole["threshold"] / "config.json")
    assert isinstance(config, PretrainConfig)
    totals = {
        name: [round(line["tokens_per_s"] * line["step_ms"] / 1e3) for line in metrics(whole[name])]
        for name in ("batch", "threshold")
    }
    assert totals["batch"] == pytest.approx([32 * config.num_visible] * STEPS, abs=1)  # both are rounded
    assert max(totals["threshold"]) <= 32 * config.most.visible
    assert len(set(totals["threshold"])) > 2


def test_running_quantile_goes_on_where_it_was(whole: dict[str, Path], demo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*SMALL, "--ds-config", ds_config("zero0"), "--batch.micro-size", "32", *BUDGETS["threshold"]]
    for steps in (3, STEPS):
        done = compute(flags(demo_folder, out, *words, steps=steps))
        assert done.returncode == 0, done.stderr
    assert losses(out) == losses(whole["threshold"])
    states = [
        json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
        for run in (out, whole["threshold"])
    ]
    assert states[0]["threshold"] == states[1]["threshold"] > 0
