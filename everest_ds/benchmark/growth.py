"""`everest benchmark step RECIPE --sweep-ratio ...` or `--sweep-frames ...`: what a step costs as its work grows.

All points of a sweep are steps of one engine with the same weights, taken in turns (`turns`), each on clips of its
own. A straight line through their times tells a step's fixed cost (the optimiser, and the ranking of all tokens
where the ratio grows) from what each further token costs; how far the points lie off it says how linear the cost
is. Attention alone grows with the square of a clip's tokens: points whose time is mostly attention are shown, but
have no part in the line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from everest_ds import distributed
from everest_ds.benchmark.step_options import StepOptions
from everest_ds.benchmark.step_report import Report, describe_run, growth_head, growth_rows
from everest_ds.benchmark.timing import Outcome, Side, milliseconds, take_turns
from everest_ds.benchmark.workbench import (
    Workbench,
    build_workbench,
    limit_memory,
    profiled_shares,
    resolve_classes,
    synthetic_batch,
    take_step,
)
from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.distributed import World
from everest_ds.errors import UserError

# A line goes through any two points.
LEAST_POINTS = 3
# Share of a step's time from which attention counts as most of it.
DOMINATES = 0.5


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a sweep.

    Attributes:
        value: What was asked for: a ratio, or a number of frames.
        config: The recipe with it.
    """

    value: float
    config: Config

    @property
    def selected(self) -> int:
        """Tokens of a clip that are selected, of the average clip where clips may differ."""
        if isinstance(self.config, FinetuneConfig):
            return self.config.num_kept
        assert isinstance(self.config, PretrainConfig)
        return self.config.num_selected


def sweep_growth(config: Config, options: StepOptions, sizes: Sequence[int] | None, world: World) -> int:
    """Measure a sweep over ratios or frames, print its one line, or its table, and return 0.

    Args:
        config: The recipe.
        options: With sweep_ratio or sweep_frames.
        sizes: Micro-batches that were asked for, None for auto: one number will do.
        world: One process.

    Raises:
        UserError: The sweep, or one of its points, cannot be.
    """
    what = "ratio" if options.sweep_ratio else "frames"
    if sizes is None or len(sizes) > 1:
        raise UserError(
            f"--sweep-{what} with --micro-batch {' '.join(options.micro_batch)}: all points of a sweep have one "
            "micro-batch; name one number"
        )
    config = resolve_classes(config)
    points = ratio_points(config, options.sweep_ratio) or frame_points(config, options.sweep_frames)
    limit_memory(options.memory_gib, world)
    bench = build_workbench(points[0].config, options.ds_config, options.precision, world, micro_size=sizes[0])
    same = {
        **describe_run("step-growth", config, bench.device, **options.of_run),
        "ds_config": None if options.ds_config is None else str(options.ds_config),
        **bench.describe(),
        "time": "cpu" if bench.device.type == "cpu" else "wall",
        "grows": what,
    }
    report = Report(world, same, head=growth_head(what), rows=growth_rows, as_json=options.json)
    report.print(measure_growth(bench, points, sizes[0], rounds=options.steps, warmup=options.warmup))
    distributed.finish()
    return 0


def ratio_points(config: Config, ratios: Sequence[float]) -> list[Point]:
    """Return a recipe at several ratios, the same share of the selected tokens visible at each; none without any.

    Raises:
        UserError: Fewer than three different ratios, or one that cannot be.
    """
    _require_points("--sweep-ratio", ratios)
    if isinstance(config, FinetuneConfig):
        kept = config.selection
        return [Point(value=r, config=replace(config, selection=replace(kept, keep_ratio=r))) for r in ratios]
    assert isinstance(config, PretrainConfig)
    chosen = config.selection
    share = _decimal(chosen.visible_ratio) / _decimal(chosen.selected_ratio)
    points = []
    for ratio in ratios:
        visible = float(_decimal(ratio) * share)
        selection = replace(chosen, selected_ratio=ratio, visible_ratio=visible)
        points.append(Point(value=ratio, config=replace(config, selection=selection)))
    return points


def frame_points(config: Config, frames: Sequence[int]) -> list[Point]:
    """Return a recipe with clips of several lengths; none without any.

    Positions are laid out for the recipe's own length and resampled for the others.

    Raises:
        UserError: Fewer than three different lengths, or one that cannot be.
    """
    _require_points("--sweep-frames", frames)
    model = replace(config.model, position_frames=config.model.position_frames or config.data.num_frames)
    return [
        Point(value=count, config=replace(config, data=replace(config.data, num_frames=count), model=model))
        for count in frames
    ]


def measure_growth(
    bench: Workbench, points: Sequence[Point], micro_size: int, *, rounds: int, warmup: int
) -> dict[str, Any]:
    """Return the points of a sweep and the line through them, as fields of a line.

    Args:
        bench: What is measured; its model serves every point.
        points: At least three.
        micro_size: Clips of a step.
        rounds: Timed steps of each point.
        warmup: Steps of each before them.

    Raises:
        UserError: A point does not fit into the device's memory.
    """
    steps = [_make_step(bench, point, micro_size) for point in points]
    sides = [Side(str(point.value), step, _nothing) for point, step in zip(points, steps, strict=True)]
    outcomes = list(take_turns(sides, bench.device, rounds=rounds, warmup=warmup).values())
    rows = [
        _describe(bench, point, step, outcome, micro_size)
        for point, step, outcome in zip(points, steps, outcomes, strict=True)
    ]
    return {"micro_batch": micro_size, **add_line(rows)}


def add_line(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit a straight line through times over tokens, and say of each point how far it lies off.

    The squares of relative distances are least: short steps count as much as long ones.

    Args:
        rows: With tokens, step_ms_median and attention_share (None where it was not seen); each gets is_fitted,
            and line_ms and off_line, its share of the line, both None where too few points are left for a line.

    Returns:
        points, the rows; fixed_ms and ms_per_1000_tokens of the line; worst_off_line, the largest distance of the
        fitted points, without its sign. The three are None where there is no line.
    """
    for row in rows:
        row["is_fitted"] = (row["attention_share"] or 0.0) <= DOMINATES
    fitted = [row for row in rows if row["is_fitted"]]
    if len(fitted) < LEAST_POINTS:
        rows = [{**row, "line_ms": None, "off_line": None} for row in rows]
        return {"points": rows, "fixed_ms": None, "ms_per_1000_tokens": None, "worst_off_line": None}
    tokens = np.array([row["tokens"] for row in fitted], dtype=float)
    times = np.array([row["step_ms_median"] for row in fitted])
    slope, fixed = np.polyfit(tokens, times, 1, w=1 / times)
    for row in rows:
        line_ms = fixed + slope * row["tokens"]
        row |= {"line_ms": round(line_ms, 3), "off_line": round(row["step_ms_median"] / line_ms - 1, 4)}
    return {
        "points": rows,
        "fixed_ms": round(float(fixed), 3),
        "ms_per_1000_tokens": round(float(slope) * 1e3, 4),
        "worst_off_line": max(abs(row["off_line"]) for row in fitted),
    }


def _make_step(bench: Workbench, point: Point, micro_size: int) -> Callable[[], float]:
    """Return a step of a point; its clips and their noise lie on the device."""
    task, config = bench.task, point.config
    task.adopt(config)
    batch = synthetic_batch(task, config, micro_size, bench.device, config.run.seed)
    inputs = task.inputs(batch, bench.device)

    def step() -> float:
        task.adopt(config)
        try:
            return float(take_step(bench, inputs))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{micro_size} clips of {config.tokens} do not fit into the memory; name a smaller --micro-batch"
            ) from error

    return step


def _describe(
    bench: Workbench, point: Point, step: Callable[[], float], outcome: Outcome, micro_size: int
) -> dict[str, Any]:
    """Return what a point came to."""
    shares = profiled_shares(bench, step)
    times, tokens = milliseconds(outcome.seconds), micro_size * point.selected
    return {
        "value": point.value,
        "tokens": tokens,
        "visible_tokens": bench.task.visible_tokens,
        **times,
        "ms_per_1000_tokens": round(times["step_ms_median"] / tokens * 1e3, 4),
        "attention_share": None if shares is None else shares["attention"],
        "step_gib": None if outcome.peak_gib is None else round(outcome.peak_gib, 4),
    }


def _require_points(option: str, values: Sequence[float]) -> None:
    if values and len(set(values)) < max(LEAST_POINTS, len(values)):
        raise UserError(
            f"{option} {' '.join(map(str, values))} must name at least {LEAST_POINTS} different values, each once: "
            "a line goes through any two points"
        )


def _decimal(ratio: float) -> Fraction:
    """Return a ratio as the decimal that was written."""
    return Fraction(repr(float(ratio)))


def _nothing() -> None:
    """Let go of nothing: the engine empties its gradients at the end of each step."""
