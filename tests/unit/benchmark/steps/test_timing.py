"""Clocks, and the measured peak speed of matmuls."""

from __future__ import annotations

import pytest
import torch

from everest_ds.benchmark.steps import timing
from everest_ds.benchmark.steps.timing import Marks, step_times, work_seconds

CPU = torch.device("cpu")


def test_marks_are_the_times_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr("everest_ds.benchmark.steps.timing.time.perf_counter", lambda: next(times))
    marks = Marks(CPU)
    for _ in range(3):
        marks.mark()
    assert marks.seconds() == [0.5, 1.5]


def test_work_on_a_cpu_is_timed_by_what_it_took_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everest_ds.benchmark.steps.timing.time.process_time", lambda: 42.0)
    assert work_seconds(CPU) == 42.0


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 20, 100])
def test_p90_is_the_smallest_that_nine_tenths_do_not_exceed(count: int) -> None:
    values = [float((7 * i) % count) for i in range(count)]
    allowed = [v for v in values if sum(w <= v for w in values) >= 0.9 * count]
    assert step_times(values)["step_ms_p90"] == 1e3 * min(allowed)


def test_step_times_are_median_and_ninetieth() -> None:
    assert step_times([0.003, 0.001, 0.002]) == {"step_ms_median": 2.0, "step_ms_p90": 3.0}


def test_rate_of_a_product_is_its_operations_over_its_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Marks, "seconds", lambda self: [1.0, 0.5, 0.25])
    assert timing.matmul_tflops(CPU, torch.float32, 50, rounds=3) == 2 * 50**3 / 0.5 / 1e12
    assert timing.measure_ceiling(CPU) is None


def test_products_are_really_taken() -> None:
    assert 0 < timing.matmul_tflops(CPU, torch.float32, 64, rounds=3) < 1e3
