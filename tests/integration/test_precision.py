"""Autocast at every ZeRO stage, and runs that are started, stopped, resumed and scored with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.integration.launch import SMALL, compute, ds_config, flags, losses, metrics, weights
from tests.integration.scanning import scan

# Losses and norms of a step in another world, stage or accumulation, relative: measured 0 and 5.5e-7.
LOSS_RTOL = 5e-6


def scan_stages(precision: str, *, processes: int) -> list[dict[str, Any]]:
    """The figures of stages 0 to 3."""
    lines = scan("precision", REPOSITORY / "ds_configs", precision, 2, processes=processes)
    assert [line["stage"] for line in lines] == [0, 1, 2, 3]
    return lines


def test_autocast_computes_the_same_at_every_stage_and_sends_float32() -> None:
    """Four micro-batches accumulated, or two on each of two processes; stage 3 gathers float32, too.

    Micro-batches of another size would round the matmuls of gradients differently.
    """
    alone = scan_stages("autocast", processes=1)
    shared = scan_stages("autocast", processes=2)
    first = alone[0]
    for line in (*alone, *shared):
        assert line["losses"] == pytest.approx(first["losses"], rel=LOSS_RTOL)
        assert line["norms"] == pytest.approx(first["norms"], rel=LOSS_RTOL)
        assert line["weights"] == ["torch.float32"]
    assert all(line["sent"] == ["torch.float32"] for line in shared)
    for name in ("losses", "norms"):
        worst = max(abs(a / b - 1) for line in shared for a, b in zip(line[name], first[name], strict=True))
        print(f"{name}: worst {worst:.1e}")
    bf16 = scan_stages("bf16", processes=2)  # so that the check of dtypes can fail
    assert all(line["weights"] == ["torch.bfloat16"] for line in bf16)
    assert all("torch.bfloat16" in line["sent"] for line in bf16)
    assert all(line["losses"] != first["losses"] for line in bf16)


def run(demo_folder: Path, out: Path, *extra: str, steps: int) -> str:
    words = ["--run.save-every-steps", "2", "--ds-config", ds_config("zero2")]
    done = compute(flags(demo_folder, out, *SMALL, *words, *extra, steps=steps))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_run_under_autocast_goes_on_bit_for_bit_and_in_no_other_precision(
    demo_folder: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    autocast = ["--precision", "autocast"]
    shown = run(demo_folder, whole, *autocast, steps=4)
    assert "ZeRO-2, float32 with matmuls in bfloat16, attention sdpa" in shown
    (start,) = metrics(whole, "event")[:1]
    assert (start["event"], start["dtype"], start["autocast"]) == ("start", "float32", True)
    run(demo_folder, parts, *autocast, steps=2)
    for other in ("fp32", "bf16"):
        words = [*SMALL, "--precision", other, "--ds-config", ds_config("zero2")]
        done = compute(flags(demo_folder, parts, *words, steps=4))
        assert done.returncode == 2
        said = " ".join(done.stderr.split())
        in_other = {"fp32": "float32", "bf16": "bfloat16"}[other]
        assert f"was written in float32 with matmuls in bfloat16, but this run computes in {in_other}" in said
    run(demo_folder, parts, *autocast, steps=4)
    assert losses(parts) == losses(whole)
    ours, theirs = weights(parts, 4), weights(whole, 4)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
