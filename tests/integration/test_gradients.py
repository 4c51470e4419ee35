"""Flat gradients against DeepSpeed's own path: same losses, weights, averages and optimiser states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.launch import SMALL, compute, ds_config, flags, losses, metrics, weights
from tests.integration.scanning import scan

STEPS, STEPS_WHEN_SLOW = 10, 50
KINDS = ("plain", "accumulation", "skipping", "finetune", "frozen")
# Flat norms are summed in float32, DeepSpeed's in float64 or another order: measured 1.3e-6 (bf16), 2.2e-7 (fp32).
NORM_RTOL = 3e-6
# Clipping divides by the norm, so its rounding reaches the weights: measured 3.3e-7 after 50 steps in float32.
CLIPPED_RTOL = 3e-6


def compare(processes: int, cases: list[str], steps: int = STEPS) -> list[dict[str, Any]]:
    lines = scan("gradients", steps, *cases, processes=processes, timeout_s=1500)
    assert [line["case"] for line in lines] == cases
    for line in lines:
        own, flat = line["counters"]
        assert own == flat
        assert flat[0] == steps
        assert line["in_place"] == [True, 0]  # as a captured graph needs it (`train.step.graph`)
    return lines


def require_equal(line: dict[str, Any]) -> None:
    """Require bitwise identical results, except for the norm itself."""
    own, flat = line["losses"]
    assert flat == own, line["case"]
    assert line["worst"] == 0, line["case"]
    own, flat = line["norms"]
    assert flat == pytest.approx(own, rel=NORM_RTOL), line["case"]


def differs_by_design(case: str) -> bool:
    """At ZeRO-0 in bf16 DeepSpeed accumulates in bfloat16 and flat rows in float32; three micro-batches show it."""
    return case == "0,bf16,accumulation"


@pytest.mark.parametrize("processes", [1, 2])
def test_flat_gradients_give_what_deepspeeds_own_path_gives(processes: int) -> None:
    """Covers every ZeRO stage, and every kind of run once."""
    cases = [f"{stage},bf16,plain" for stage in range(3)]
    kinds = ("0,fp32,skipping", "1,bf16,accumulation", "2,bf16,skipping", "2,autocast,frozen", "2,fp32,finetune")
    for line in compare(processes, [*cases, *(kinds if processes == 2 else ())]):
        require_equal(line)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_flat_gradients_give_what_deepspeeds_own_path_gives_in_every_kind_of_run(
    precision: str, processes: int
) -> None:
    cases = [f"{stage},{precision},{kind}" for stage in range(3) for kind in KINDS]
    for line in compare(processes, [case for case in cases if not differs_by_design(case)], STEPS_WHEN_SLOW):
        require_equal(line)


def test_clipping_differs_by_the_rounding_of_the_norm() -> None:
    for line in compare(2, [f"{stage},fp32,clipping" for stage in range(3)]):
        own, flat = line["losses"]
        for theirs, ours in zip(own, flat, strict=True):
            assert ours == pytest.approx(theirs, rel=CLIPPED_RTOL), line["case"]
        own, flat = line["norms"]
        assert min(own) > 0.1  # twice the clipping norm
        assert flat == pytest.approx(own, rel=CLIPPED_RTOL), line["case"]


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1))])
def test_run_of_either_path_goes_on_in_the_other_bit_for_bit(stage: int, demo_folder: Path, tmp_path: Path) -> None:
    """Two micro-batches a step on two processes, float32, nothing clipped."""

    def train(name: str, gradients: str, steps: int) -> str:
        words = ["--batch.micro-size", "1", "--optim.max-grad-norm", "0", "--run.save-every-steps", "2"]
        words += ["--precision", "fp32", "--ds-config", ds_config(f"zero{stage}"), "--optim.gradients", gradients]
        done = compute(flags(demo_folder, tmp_path / name, *SMALL, *words, steps=steps), processes=2)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "deepspeed gradients" in train("whole", "deepspeed", 4)
    for name, first, then in (("forth", "deepspeed", "flat"), ("back", "flat", "deepspeed")):
        train(name, first, 2)
        assert f"{then} gradients" in train(name, then, 4)
        assert [line["gradients"] for line in metrics(tmp_path / name, "event") if "gradients" in line] == [
            first,
            then,
        ]
        assert losses(tmp_path / name) == losses(tmp_path / "whole")
        ours, theirs = weights(tmp_path / name, 4), weights(tmp_path / "whole", 4)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
