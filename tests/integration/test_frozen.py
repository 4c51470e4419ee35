"""Frozen weights in checkpoints: saved at every ZeRO stage, exported, and resumed in another world.

All runs start from weights of another seed, so that a frozen weight that is not restored differs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everest_ds.train.checkpoints.consolidated import read_fp32_weights
from tests.integration.launch import SMALL, compute, ds_config, metrics

HEAD = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
RTOL = 1e-6  # losses in another world and stage: measured identical; without restoring, 0.7 % apart


def probe(
    folder: Path, out: Path, *extra: str | Path, steps: int, stage: int, precision: str = "fp32"
) -> list[str]:
    """Arguments of a short linear probe that logs every step and saves every second one."""
    words = ["finetune", "demo_ft", "--data.train-list", folder / "train.csv", "--out", out]
    words += ["--model.freeze-encoder", "--data.num-workers", "0", "--batch.micro-size", "16"]
    words += ["--model.head-init-scale", "1", "--optim.warmup-epochs", "0"]  # every feature shows in the loss
    words += ["--run.log-every-steps", "1", "--run.save-every-steps", "2", "--run.max-steps", steps]
    words += ["--precision", precision, "--ds-config", ds_config(f"zero{stage}")]
    return [str(word) for word in (*words, *SMALL, *extra)]


def run(words: list[str], *, processes: int = 1) -> None:
    done = compute(words, processes=processes)
    assert done.returncode == 0, done.stderr


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return read_fp32_weights(run_dir / "checkpoints" / f"step-{step:08d}")


@pytest.fixture(scope="module")
def source(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another seed."""
    out = tmp_path_factory.mktemp("source") / "run"
    run(probe(demo_folder, out, "--run.seed", "7", steps=1, stage=0))
    return out


def require_frozen_as(source: Path, found: dict[str, torch.Tensor], *, bf16: bool = False) -> None:
    expected = weights(source, 1)
    assert found.keys() == expected.keys()
    for name in expected.keys() - HEAD:
        tensor = expected[name].bfloat16().float() if bf16 else expected[name]
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("was", "stage"),
    [(2, 3), pytest.param(3, 2, marks=pytest.mark.slow), pytest.param(1, 3, marks=pytest.mark.slow)],
)
def test_frozen_weights_go_on_in_another_world_and_stage(
    was: int, stage: int, source: Path, demo_folder: Path, tmp_path: Path
) -> None:
    """From two processes to one."""
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    run(probe(demo_folder, whole, "--init-from", source, steps=4, stage=was), processes=2)
    require_frozen_as(source, weights(whole, 2))
    checkpoint = whole / "checkpoints" / "step-00000002"
    run(probe(demo_folder, branch, "--resume", checkpoint, steps=4, stage=stage))
    require_frozen_as(source, weights(branch, 4))
    expected = {line["step"]: line["loss"] for line in metrics(whole) if line["step"] > 2}
    found = {line["step"]: line["loss"] for line in metrics(branch)}
    print(f"{was} -> {stage}: {max(abs(found[step] / expected[step] - 1) for step in expected):.1e}")
    assert found == pytest.approx(expected, rel=RTOL)
    assert len(found) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_frozen_weights_are_read_at_every_stage_and_go_on_in_the_same_world(
    stage: int, precision: str, source: Path, demo_folder: Path, tmp_path: Path
) -> None:
    """A run with a break in the middle is bitwise identical to one without."""
    runs = tmp_path / "broken", tmp_path / "whole"
    for out, stops in zip(runs, ((2, 4), (4,)), strict=True):
        for steps in stops:
            words = probe(demo_folder, out, "--init-from", source, steps=steps, stage=stage, precision=precision)
            run(words, processes=2)
            require_frozen_as(source, weights(out, steps), bf16=precision == "bf16")
    broken, whole = ([line["loss"] for line in metrics(out)] for out in runs)
    assert len(whole) == 4
    assert broken == whole
    ours, theirs = (weights(out, 4) for out in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
