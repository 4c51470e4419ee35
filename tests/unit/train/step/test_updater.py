from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from everest_ds.config import OptimConfig
from everest_ds.train.step.optim import make_optimizer
from everest_ds.train.step.updater import DeepSpeedUpdater, global_norm

LEARNING_RATE, DECAY, BETAS, EPS = 0.1, 0.05, (0.9, 0.95), 1e-8
GRADIENTS = [[3.0, -4.0], [0.1, 0.2], [math.inf, 1.0], [30.0, 0.5], [math.nan, math.nan], [0.4, -0.3]]
RTOL = 1e-6  # float32 against Python floats; measured 2e-7


class BareEngine:
    """Behaves like DeepSpeed's engine in float32 without ZeRO: only the optimiser."""

    device = torch.device("cpu")
    skipped_steps = 0

    def __init__(self, value: list[float], *, accumulation: int = 1) -> None:
        self.module = torch.nn.Module()
        self.module.weight = torch.nn.Parameter(torch.tensor(value))
        groups = [{"params": list(self.module.parameters()), "weight_decay": DECAY, "lr_scale": 1.0}]
        self.optimizer = make_optimizer(groups, OptimConfig(betas=BETAS, eps=EPS))
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE
        self._config = SimpleNamespace(gradient_clipping=7.0)
        self.accumulation, self.micro_steps = accumulation, 0

    def zero_optimization_stage(self) -> int:
        return 0

    def bfloat16_enabled(self) -> bool:
        return False

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro_steps + 1) % self.accumulation == 0

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            self.optimizer.step()
        self.micro_steps += 1


def adamw_in_python(weights: list[float], max_norm: float) -> tuple[list[list[float]], int]:
    """Return AdamW's results with decoupled decay and clipping by the global norm; non-finite steps are skipped."""
    means, squares, updates, seen = [0.0] * len(weights), [0.0] * len(weights), 0, []
    for gradient in GRADIENTS:
        norm = math.sqrt(sum(g * g for g in gradient))
        if math.isfinite(norm):
            updates += 1
            factor = max((norm + 1e-6) / max_norm, 1.0) if max_norm else 1.0
            for i, g in enumerate(gradient):
                means[i] = BETAS[0] * means[i] + (1 - BETAS[0]) * g / factor
                squares[i] = BETAS[1] * squares[i] + (1 - BETAS[1]) * (g / factor) ** 2
                mean, square = means[i] / (1 - BETAS[0] ** updates), squares[i] / (1 - BETAS[1] ** updates)
                weights[i] -= LEARNING_RATE * (DECAY * weights[i] + mean / (math.sqrt(square) + EPS))
        seen.append(list(weights))
    return seen, updates


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_steps_are_adamws_clipped_and_those_that_are_not_finite_left_out(max_norm: float) -> None:
    expected, num_updates = adamw_in_python([1.0, -2.0], max_norm)
    engine = BareEngine([1.0, -2.0])
    updater = DeepSpeedUpdater(engine, max_norm)
    for gradient, weights in zip(GRADIENTS, expected, strict=True):
        engine.module.weight.grad = torch.tensor(gradient)
        result = updater.step()
        assert result is not None
        assert bool(result.applied) == all(map(math.isfinite, gradient))
        if result.applied:
            assert float(result.grad_norm) == pytest.approx(math.hypot(*gradient), rel=RTOL)
        assert engine.module.weight.tolist() == pytest.approx(weights, rel=RTOL)
    (state,) = engine.optimizer.state.values()
    assert float(state["step"]) == num_updates == 4


def test_engine_is_told_not_to_clip_besides() -> None:
    engine = BareEngine([1.0, -2.0])
    DeepSpeedUpdater(engine, 1.0)
    assert engine._config.gradient_clipping == 0.0


def test_micro_steps_before_the_last_update_nothing() -> None:
    engine = BareEngine([1.0, -2.0], accumulation=3)
    updater = DeepSpeedUpdater(engine, 0.0)
    engine.module.weight.grad = torch.ones(2)
    assert [updater.step() is None for _ in range(6)] == [True, True, False, True, True, False]


def test_clipping_of_a_checkpoint_gives_way_to_the_runs() -> None:
    """Checkpoints contain the clipping norm of their run, which DeepSpeed would restore."""
    inner = make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], OptimConfig())
    optimizer = SimpleNamespace(optimizer=inner, clip_grad=0.0)
    engine: Any = SimpleNamespace(
        optimizer=optimizer, zero_optimization_stage=lambda: 3, bfloat16_enabled=lambda: True
    )
    DeepSpeedUpdater(engine, 0.5)
    assert optimizer.clip_grad == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_norm_is_that_of_all_gradients_put_together(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in ((300, 7), (1,), (0,), (5000,))]
    expected = math.sqrt(sum(value * value for g in gradients for value in g.double().flatten().tolist()))
    found = global_norm(gradients, None, torch.device("cpu"))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(expected, rel=1e-7)
    assert float(global_norm([], None, torch.device("cpu"))) == 0
