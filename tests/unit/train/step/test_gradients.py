from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from everest_ds.errors import UserError
from everest_ds.train.engine import shipped_systems
from everest_ds.train.step.gradients import NORM_CHUNK, FlatGradients, choose_gradients, chunked_norm, flat_obstacle

ZERO_2 = {"zero_optimization": {"stage": 2}}


def test_shipped_files_are_flat_below_zero_3() -> None:
    chosen = {name: choose_gradients("auto", systems) for name, systems in shipped_systems().items()}
    assert chosen == {
        "zero0": "flat",
        "zero1": "flat",
        "zero2": "flat",
        "zero3": "deepspeed",
        "zero3_offload": "deepspeed",
    }


@pytest.mark.parametrize(
    ("systems", "reason"),
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO-3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        (ZERO_2 | {"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype=bf16"),
        (ZERO_2 | {"flops_profiler": {"enabled": True}}, "flops_profiler"),
        (ZERO_2 | {"comms_logger": {"enabled": True}}, "comms_logger"),
        (ZERO_2 | {"wall_clock_breakdown": True}, "wall_clock_breakdown"),
    ],
)
def test_what_only_deepspeeds_own_path_does_is_left_to_it_or_refused(systems: dict[str, Any], reason: str) -> None:
    assert choose_gradients("auto", systems) == choose_gradients("deepspeed", systems) == "deepspeed"
    with pytest.raises(UserError, match=rf"gradients=flat is not available: .*{reason}.*optim\.gradients=auto"):
        choose_gradients("flat", systems)


def test_settings_that_change_nothing_are_no_obstacle() -> None:
    none = {"offload_optimizer": {"device": "none"}, "round_robin_gradients": True, "overlap_comm": True}
    for stage in range(3):
        systems = {
            "zero_optimization": {"stage": stage, **none},
            "data_types": {"grad_accum_dtype": "fp32"},
            "flops_profiler": {"enabled": False},
        }
        assert flat_obstacle(systems) is None


@pytest.mark.parametrize("length", [1, NORM_CHUNK - 1, NORM_CHUNK, 5 * NORM_CHUNK + 3, 1 << 24])
def test_norm_is_right_to_float32_for_long_rows_too(length: int) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(0)) * 1e-3
    expected = math.sqrt(float(values.double().square().sum()))
    assert float(chunked_norm(values)) == pytest.approx(expected, rel=1e-6)  # measured: 2e-7; torch's own 5e-4
    values[-1] = math.inf
    assert not chunked_norm(values).isfinite()


class BareEngine:
    """Behaves like DeepSpeed's engine in float32 without ZeRO."""

    communication_data_type = torch.float32

    def __init__(self, parameters: list[torch.nn.Parameter], accumulation: int = 1) -> None:
        self.optimizer: Any = torch.optim.AdamW(parameters)
        self.accumulation = accumulation
        self.seq_data_parallel_group = None

    def zero_optimization_stage(self) -> int:
        return 0

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("accumulation", [1, 3])
def test_parameter_without_a_gradient_has_zeros_even_after_a_step_in_which_it_had_one(accumulation: int) -> None:
    used, unused = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))
    flat = FlatGradients(BareEngine([used, unused], accumulation))
    for gradient in (torch.full((4,), 7.0), None):
        for step in range(accumulation):
            used.grad, unused.grad = torch.arange(6.0).view(2, 3), gradient
            flat.collect()
            assert used.grad is None
            flat.reduce(first=step == 0, last=step == accumulation - 1)
    (row,) = flat.rows
    row.hand_over()
    assert used.grad is not None
    assert torch.equal(used.grad, accumulation * torch.arange(6.0).view(2, 3))
    assert torch.equal(unused.grad, torch.zeros(4))
    assert float(flat.norm()) == pytest.approx(accumulation * math.sqrt(55))
    row.release()
    assert used.grad is None


@pytest.mark.usefixtures("alone")
def test_deepspeed_that_keeps_its_weights_otherwise_is_refused_by_name() -> None:
    engine = BareEngine([torch.nn.Parameter(torch.ones(2))])
    engine.zero_optimization_stage = lambda: 2  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"single_partition_of_fp32_groups.*use DeepSpeed 0\.19\.8"):
        FlatGradients(engine)
    weights, master = torch.ones(8), torch.ones(3)
    engine.optimizer = SimpleNamespace(
        bit16_groups=[[torch.nn.Parameter(weights[:8])]],
        bit16_groups_flat=[weights],
        single_partition_of_fp32_groups=[master],
        _grad_acc_hooks=[],
    )
    with pytest.raises(UserError, match="its parts of the weights have unexpected sizes"):
        FlatGradients(engine)
