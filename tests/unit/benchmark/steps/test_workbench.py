"""Measuring steps: the synthetic clips, and how the times of several processes are combined."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from everest_ds.benchmark.steps import workbench
from everest_ds.benchmark.steps.workbench import moving_clips, synthetic_batch
from everest_ds.recipes import find_config
from everest_ds.train.tasks import make_task

CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_clips_move_in_a_part_and_stand_still_in_another() -> None:
    clips_BCTHW = moving_clips(3, 6, 32, seeded(0))
    assert clips_BCTHW.shape == (3, 3, 6, 32, 32)
    assert clips_BCTHW.dtype == torch.uint8
    for first, second in itertools.pairwise(clips_BCTHW.unbind(2)):
        changed = (first != second).any(dim=1)
        assert changed.any(dim=(1, 2)).all()
        assert (~changed).float().mean() > 0.2
    assert torch.equal(clips_BCTHW, moving_clips(3, 6, 32, seeded(0)))
    assert not torch.equal(clips_BCTHW, moving_clips(3, 6, 32, seeded(1)))
    assert not torch.equal(clips_BCTHW[0], clips_BCTHW[1])


@pytest.mark.parametrize("recipe", ["demo", "demo_ft", "frames", "mixed"])
def test_synthetic_batch_is_what_the_task_takes(recipe: str) -> None:
    """Every kind of task computes a loss from its synthetic batch."""
    config: Any = find_config("demo" if recipe == "frames" else "demo_ft" if recipe == "mixed" else recipe)
    if recipe == "frames":
        config = replace(config, selection=replace(config.selection, alpha=1.5))
    if config.task == "finetune":
        config = replace(config, data=replace(config.data, num_classes=5))
    if recipe == "mixed":
        config = replace(config, data=replace(config.data, mixup_alpha=0.8))
    task = make_task(config)
    batch = synthetic_batch(task, 2, CPU, 0)
    assert (batch.target_BK is not None) == (recipe == "mixed")
    assert batch.clips_BCTHW.shape[2] == (24 if recipe == "frames" else 16)
    assert task(*task.inputs(batch, CPU)).isfinite()
    again = synthetic_batch(task, 2, CPU, 0)
    assert torch.equal(batch.clips_BCTHW, again.clips_BCTHW)
    assert torch.equal(batch.noise_BS, again.noise_BS)


def test_throughput_is_that_of_the_slowest_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fake processes: step time and memory are the maximum, tokens are the sum."""
    bench = SimpleNamespace(updater=SimpleNamespace(graph=None), 
        device=CPU, world=SimpleNamespace(rank=0, size=2),
        task=SimpleNamespace(
            config=find_config("demo"), inputs=lambda batch, device: (), visible_tokens=10, clip_flops=lambda: 2e12
        ),
    )  # fmt: skip
    monkeypatch.setattr(workbench, "synthetic_batch", lambda *given: None)
    monkeypatch.setattr(workbench, "take_step", lambda bench, inputs: None)
    profiled = SimpleNamespace(fields=lambda: {"shares": None})
    monkeypatch.setattr(workbench, "profile_step", lambda device, step, num_kernels: profiled)
    mine, other = ([0.1, 0.4], 20, 1.0, None), ([0.3, 0.2], 22, 2.0, None)
    monkeypatch.setattr(workbench.distributed, "gather_objects", lambda own: [mine, other])
    found = workbench.measure_steps(bench, 3, steps=2, warmup=0, ceiling_tflops=100.0)
    assert found["clips_per_s"] == pytest.approx(3 * 2 * 2 / 0.7, abs=1e-4)
    assert found["tokens_per_s"] == pytest.approx(42 / 0.7, abs=0.1)
    assert found["step_ms_median"] == pytest.approx(statistics.median([300, 400]))
    assert found["peak_allocated_gib"] == 2.0
    assert found["mfu"] == pytest.approx(found["clips_per_s"] / 2 * 2 / 100, abs=1e-4)
