"""Sweeps over the number of tokens: points, the line fitted to the step times, equal weights at all points."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from everest_ds.benchmark.steps import growth
from everest_ds.benchmark.steps.growth import (
    fit_line,
    frame_points,
    growth_rows,
    growth_table,
    measure_growth,
    ratio_points,
    selected_tokens,
)
from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.errors import UserError
from everest_ds.recipes import find_config
from everest_ds.train.tasks import make_task

CPU = torch.device("cpu")


def small(recipe: str) -> Config:
    config = find_config(recipe)
    data = replace(config.data, num_frames=8, image_size=32)
    if isinstance(config, FinetuneConfig):
        data = replace(data, num_classes=3)
    return replace(config, model=replace(config.model, size="nano"), data=data)


def rows(*points: tuple[int, float], attention: float | None = 0.1) -> list[dict[str, Any]]:
    return [{"tokens": x, "step_ms_median": y, "attention_share": attention} for x, y in points]


def test_line_is_found_again_in_times_that_lie_on_one() -> None:
    found = fit_line(rows((1000, 12.5), (2000, 15.0), (5000, 22.5)))
    assert found["fixed_ms"] == 10.0
    assert found["ms_per_1000_tokens"] == 2.5
    assert found["worst_off_line"] == 0.0
    assert [row["line_ms"] for row in found["points"]] == [12.5, 15.0, 22.5]


def test_line_has_the_least_squares_of_relative_distances() -> None:
    """The oracle solves the normal equations in exact fractions."""
    points = [(100, 7.0), (200, 8.0), (400, 17.0), (900, 30.0)]
    weights = [1 / Fraction(y) ** 2 for _, y in points]

    def mean(*values: Fraction) -> Fraction:
        return sum((w * v for w, v in zip(weights, values, strict=True)), Fraction(0)) / sum(weights)

    x, y = mean(*(Fraction(a) for a, _ in points)), mean(*(Fraction(b) for _, b in points))
    xy, xx = mean(*(a * Fraction(b) for a, b in points)), mean(*(Fraction(a) ** 2 for a, _ in points))
    slope = (xy - x * y) / (xx - x * x)
    found = fit_line(rows(*points))
    assert found["ms_per_1000_tokens"] == pytest.approx(float(1000 * slope), abs=1e-4)
    assert found["fixed_ms"] == pytest.approx(float(y - slope * x), abs=1e-3)
    off = [float(Fraction(b) / (y - slope * x + slope * a) - 1) for a, b in points]
    assert [row["off_line"] for row in found["points"]] == pytest.approx(off, abs=1e-4)
    assert found["worst_off_line"] == pytest.approx(max(map(abs, off)), abs=1e-4)


def test_point_that_is_mostly_attention_is_shown_and_has_no_part_in_the_line() -> None:
    line = rows((1000, 11.0), (2000, 12.0), (3000, 13.0))
    most = rows((8000, 90.0), attention=0.6)
    found = fit_line([*line, *most])
    assert (found["fixed_ms"], found["worst_off_line"]) == (10.0, 0.0)
    assert [row["is_fitted"] for row in found["points"]] == [True, True, True, False]
    assert found["points"][-1]["off_line"] == 4.0


def test_too_few_points_make_no_line() -> None:
    found = fit_line([*rows((1000, 11.0), (2000, 12.0)), *rows((8000, 90.0), attention=0.51)])
    assert found["fixed_ms"] is found["ms_per_1000_tokens"] is found["worst_off_line"] is None
    assert all(row["line_ms"] is None for row in found["points"])
    shown = {"value": 1, "visible_tokens": 1, "step_ms_p90": 1.0, "ms_per_1000_tokens": 1.0}
    *_, last = growth_rows(
        {**found, "points": [{**row, **shown} for row in found["points"]]}, growth_table("ratio")
    )
    assert last.startswith("no line")


def test_same_share_of_the_selected_tokens_is_visible_at_every_ratio() -> None:
    """Of 1568 tokens. The recipe's own ratio gives the recipe's configuration."""
    config = find_config("k400_vit_b")
    found = list(ratio_points(config, [0.1, 0.3, 1.0]).values())
    assert all(isinstance(one, PretrainConfig) for one in found)
    assert [(one.num_selected, one.num_visible) for one in found] == [(156, 52), (470, 156), (1568, 522)]
    assert found[1] == config
    points = ratio_points(find_config("k400_vit_b_ft"), [0.2, 0.6, 1.0])
    assert {ratio: selected_tokens(point) for ratio, point in points.items()} == {0.2: 313, 0.6: 940, 1.0: 1568}


def test_positions_stay_laid_out_for_the_recipes_own_length() -> None:
    found = list(frame_points(find_config("k400_vit_b"), [8, 16, 64]).values())
    assert [one.grid.num_tokens for one in found] == [784, 1568, 6272]
    assert {one.position_grid.num_tokens for one in found} == {1568}


def benches(points: dict[float, Config]) -> dict[float, Any]:
    """Return tasks without engines, all with the same weights, as `build_workbench` creates them."""
    found = {}
    for value, config in points.items():
        torch.manual_seed(0)
        found[value] = SimpleNamespace(task=make_task(config), device=CPU)
    return found


@pytest.mark.parametrize("recipe", ["demo", "demo_ft"])
@pytest.mark.parametrize("grows", ["ratio", "frames"])
def test_points_start_from_the_same_weights_whatever_they_keep(recipe: str, grows: str) -> None:
    config = small(recipe)
    points = ratio_points(config, [0.3, 0.5, 0.8]) if grows == "ratio" else frame_points(config, [4, 8, 12])
    first, *others = [bench.task for bench in benches(points).values()]
    for other in others:
        for name, value in first.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


def test_points_are_interleaved_and_each_reports_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake engine only runs forward. Each round begins with another point."""
    config = small("demo")
    points = ratio_points(config, [0.3, 0.5, 0.8])
    seen: list[int] = []

    def step(bench: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        loss = bench.task(*inputs)
        seen.append(bench.task.visible_tokens)
        return loss.detach()

    monkeypatch.setattr(growth, "take_step", step)
    monkeypatch.setattr(
        growth, "profile_step", lambda device, step: SimpleNamespace(shares=step() and {"attention": 0.25})
    )
    line = measure_growth(benches(points), 2, rounds=2, warmup=1)
    visible = [2 * point.num_visible for point in points.values()]
    assert len(set(visible)) == 3
    a, b, c = visible
    assert seen == [a, b, c, b, c, a, c, a, b, a, b, c]  # the last three are profiled
    assert [row["visible_tokens"] for row in line["points"]] == visible
    assert [row["tokens"] for row in line["points"]] == [2 * point.num_selected for point in points.values()]
    assert line["micro_batch"] == 2
    for row in line["points"]:
        assert row["ms_per_1000_tokens"] == pytest.approx(row["step_ms_median"] / row["tokens"] * 1e3, abs=1e-3)


def test_point_that_does_not_fit_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("demo")

    def step(*given: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(growth, "take_step", step)
    points = ratio_points(config, [0.3, 0.5, 0.8])
    with pytest.raises(UserError, match=r"4 clips of .* do not fit into memory; name a smaller --micro-batch"):
        measure_growth(benches(points), 4, rounds=1, warmup=0)
