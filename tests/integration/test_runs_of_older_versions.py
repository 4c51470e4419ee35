"""A run of an older version resumes and gets the same results as that version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import GOLDEN
from tests.integration.launch import compute, ds_config, metrics

# Bitwise identical on the CPU that wrote the run; other CPUs sum in another order.
RELATIVE_TOLERANCE = 1e-6
SAVED_AT = 3


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """The run in its state after saving step 3."""
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "run_of_0_1", run)
    (run / "demo").rename(tmp_path / "demo")  # config.json names demo/train.csv, from where the run was started
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["step"] <= SAVED_AT]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    return run


def test_run_of_version_0_1_resumes_with_the_same_losses_and_gradient_norms(old_run: Path) -> None:
    words = [
        "finetune",
        "run/config.json",
        "--out",
        "run",
        "--ds-config",
        ds_config("zero0"),
        "--precision",
        "fp32",
    ]
    done = compute(words, folder=old_run.parent)
    assert done.returncode == 0, done.stderr
    ours, theirs = metrics(old_run), metrics(GOLDEN / "run_of_0_1")
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "lr", "weight_decay"):
        seen, expected = ([line[name] for line in lines] for lines in (ours, theirs))
        assert seen == pytest.approx(expected, rel=RELATIVE_TOLERANCE)

    before, after = (weights_of(old_run, step) for step in (SAVED_AT, 6))
    assert before.keys() == after.keys()
    trained = {name for name in before if not torch.equal(before[name], after[name])}
    assert trained == {"model.head.weight", "model.head.bias", "model.fc_norm.weight", "model.fc_norm.bias"}


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    shard = run / "checkpoints" / f"step-{step:08d}" / "mp_rank_00_model_states.pt"
    return torch.load(shard, weights_only=False)["module"]
