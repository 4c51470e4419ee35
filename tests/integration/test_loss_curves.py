"""Compare losses with all fast paths on and all off, and losses of the precisions with one another.

On: attention backend by choice, blocks compiled (by inductor, or by torch's tracer alone if there is no compiler),
activation checkpointing that keeps attention outputs, ranking by exact matmuls, the fused optimiser without
synchronisation. Off: SDPA, nothing compiled, nothing recomputed, ranking by convolution, torch's plain AdamW in
DeepSpeed's own step.
Measured with inductor, the worst step: float32 2.4e-7, bf16 7.8e-3, autocast 6.7e-3. Without fast paths, worst and
mean over 200 steps (20): autocast against fp32 6.2e-3, 1.2e-3 (1.0e-3, 1.4e-4), bf16 against fp32 1.2e-2, 1.6e-3
(1.2e-2, 3.2e-3), autocast against bf16 1.2e-2, 1.8e-3 (1.2e-2, 3.2e-3).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest

from tests.integration.scanning import scan

STEPS, FEW_STEPS = 200, 20
# All fast paths on against all off.
RTOL = {"fp32": 1e-5, "bf16": 2e-2, "autocast": 2e-2}
# One precision against another, without fast paths.
PRECISION_RTOL = 2e-2


@functools.cache
def losses(paths: str, steps: int = STEPS) -> dict[str, list[float]]:
    """The losses of every precision."""
    found = {line["precision"]: line["losses"] for line in scan("loss_curves", paths, steps, *RTOL)}
    assert {len(values) for values in found.values()} == {steps}
    return found


def differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("precision", RTOL)
def test_losses_with_every_fast_path_are_those_without(precision: str) -> None:
    plain, fast = losses("off")[precision], losses("on")[precision]
    worst = max(differences(fast, plain))
    print(f"{precision}: {plain[0]:.4f} to {plain[-1]:.4f}, worst {worst:.1e}")
    assert plain[-1] < 0.75 * plain[0]  # the loss falls
    assert 0 < worst < RTOL[precision]  # and the two paths really differ


@pytest.mark.parametrize("steps", [FEW_STEPS, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_losses_of_bf16_autocast_and_fp32_stay_together(steps: int) -> None:
    """Autocast, whose weights are float32, also starts closer to fp32 than bf16 does."""
    found = losses("off", steps)
    fp32, bf16, autocast = found["fp32"], found["bf16"], found["autocast"]
    pairs = {
        "autocast, bf16": differences(autocast, bf16),
        "autocast, fp32": differences(autocast, fp32),
        "bf16, fp32": differences(bf16, fp32),
    }
    for name, apart in pairs.items():
        mean = sum(apart) / steps
        print(f"{name}, {steps} steps: first {apart[0]:.1e}, worst {max(apart):.1e}, mean {mean:.1e}")
        assert 0 < max(apart) < PRECISION_RTOL
    assert sum(pairs["autocast, fp32"][:FEW_STEPS]) < 0.5 * sum(pairs["bf16, fp32"][:FEW_STEPS])
