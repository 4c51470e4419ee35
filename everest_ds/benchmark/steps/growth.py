"""`everest benchmark step RECIPE --sweep-ratio ...` or `--sweep-frames ...`: step time over the number of tokens.

Each point has its own task, engine and clips, and the same initial weights. Steps are interleaved, so all points
are in memory at once. A straight line through the times separates the fixed cost of a step (the optimiser, and in
sweeps of the ratio the ranking of all tokens) from the cost of each token. Only attention grows with the square of
a clip's tokens: points whose time is mostly attention are printed but not fitted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from everest_ds import distributed
from everest_ds.benchmark.options import StepOptions
from everest_ds.benchmark.report import StepReport, Table, rounded, run_fields
from everest_ds.benchmark.steps.profiling import profile_step
from everest_ds.benchmark.steps.timing import Side, interleave, step_times
from everest_ds.benchmark.steps.workbench import (
    Workbench,
    build_workbench,
    limit_memory,
    synthetic_batch,
    take_step,
    with_classes,
)
from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.distributed import World
from everest_ds.errors import UserError

LEAST_POINTS = 3
# Points with a larger share of attention in the time of their step are not fitted.
DOMINATES = 0.5


def sweep_growth(config: Config, options: StepOptions, sizes: Sequence[int] | None, world: World) -> int:
    """Measure a sweep over ratios or frames, print its JSON line or its table, and return 0."""
    grows = "ratio" if options.sweep_ratio else "frames"
    if sizes is None or len(sizes) > 1:
        raise UserError(
            f"--sweep-{grows} needs one micro-batch, got --micro-batch {' '.join(options.micro_batch)}; "
            "name one number"
        )
    config = with_classes(config)
    points = ratio_points(config, options.sweep_ratio) or frame_points(config, options.sweep_frames)
    limit_memory(options.memory_gib, world)
    try:
        benches = {
            value: build_workbench(point, options.ds_config, options.precision, world, micro_size=sizes[0])
            for value, point in points.items()
        }
    except torch.OutOfMemoryError as error:
        raise UserError(f"the engines of {len(points)} points do not fit into memory; name fewer points") from error
    first = next(iter(benches.values()))
    common = {
        **run_fields("step-growth", config, first.device, options),
        **first.settings,
        "time": "cpu" if first.device.type == "cpu" else "wall",
        "grows": grows,
    }
    table = growth_table(grows)
    report = StepReport(world, common, table, lambda line: growth_rows(line, table), as_json=options.json)
    report.print(measure_growth(benches, sizes[0], rounds=options.steps, warmup=options.warmup))
    distributed.finish()
    return 0


def ratio_points(config: Config, ratios: Sequence[float]) -> dict[float, Config]:
    """Return the recipe at each ratio, with the same share of the selected tokens visible; empty without ratios."""
    _require_points("--sweep-ratio", ratios)
    if isinstance(config, FinetuneConfig):
        return {ratio: replace(config, selection=replace(config.selection, keep_ratio=ratio)) for ratio in ratios}
    assert isinstance(config, PretrainConfig)
    # Exact decimal arithmetic: the recipe's own ratio then gives the recipe's own configuration.
    share = Fraction(repr(config.selection.visible_ratio)) / Fraction(repr(config.selection.selected_ratio))
    points: dict[float, Config] = {}
    for ratio in ratios:
        visible = float(Fraction(repr(ratio)) * share)
        selection = replace(config.selection, selected_ratio=ratio, visible_ratio=visible)
        points[ratio] = replace(config, selection=selection)
    return points


def frame_points(config: Config, frames: Sequence[int]) -> dict[float, Config]:
    """Return the recipe with clips of each length; empty without lengths.

    Positions are made for the recipe's own length and resampled for the others.
    """
    _require_points("--sweep-frames", frames)
    model = replace(config.model, position_frames=config.model.position_frames or config.data.num_frames)
    return {count: replace(config, data=replace(config.data, num_frames=count), model=model) for count in frames}


def selected_tokens(config: Config) -> int:
    """Return the number of selected tokens of a clip; of the average clip if clips differ."""
    if isinstance(config, FinetuneConfig):
        return config.num_kept
    assert isinstance(config, PretrainConfig)
    return config.num_selected


def measure_growth(benches: dict[float, Workbench], micro_size: int, *, rounds: int, warmup: int) -> dict[str, Any]:
    """Measure the points of a sweep, keyed by ratio or number of frames; return the fields of its line."""
    device = next(iter(benches.values())).device
    sides = [Side(str(value), _make_step(bench, micro_size)) for value, bench in benches.items()]
    times = interleave(sides, device, rounds=rounds, warmup=warmup)
    rows = []
    for side, (value, bench) in zip(sides, benches.items(), strict=True):
        shares = profile_step(device, side.step).shares
        measured, tokens = step_times(times[side.name].seconds), micro_size * selected_tokens(bench.task.config)
        row: dict[str, Any] = {"value": value, "tokens": tokens, "visible_tokens": bench.task.visible_tokens}
        row |= {**measured, "ms_per_1000_tokens": round(measured["step_ms_median"] / tokens * 1e3, 4)}
        row |= {"attention_share": shares and shares["attention"], "step_gib": rounded(times[side.name].peak_gib)}
        rows.append(row)
    return {"micro_batch": micro_size, **fit_line(rows)}


def _make_step(bench: Workbench, micro_size: int) -> Callable[[], float]:
    """Return a function that takes a step of a point; its clips are on the device."""
    config = bench.task.config
    inputs = bench.task.inputs(synthetic_batch(bench.task, micro_size, bench.device, config.run.seed), bench.device)

    def step() -> float:
        """Take one step and return its loss."""
        try:
            return float(take_step(bench, inputs))
        except torch.OutOfMemoryError as error:
            what = f"{micro_size} clips of {config.tokens}"
            raise UserError(f"{what} do not fit into memory; name a smaller --micro-batch") from error

    return step


def fit_line(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit a straight line to times over tokens by least squares of the relative distances.

    Each row gets the fields is_fitted, line_ms, and off_line, its relative distance from the line. The result has
    the rows as ``points``, the line's fixed_ms and ms_per_1000_tokens, and worst_off_line, the largest absolute
    distance of a fitted point. The line's fields are None if too few points are left.
    """
    for row in rows:
        row["is_fitted"] = (row["attention_share"] or 0.0) <= DOMINATES
    fitted = [row for row in rows if row["is_fitted"]]
    if len(fitted) < LEAST_POINTS:
        rows = [{**row, "line_ms": None, "off_line": None} for row in rows]
        return {"points": rows, "fixed_ms": None, "ms_per_1000_tokens": None, "worst_off_line": None}
    tokens, times = np.array([(row["tokens"], row["step_ms_median"]) for row in fitted]).T
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


def growth_table(grows: str) -> Table:
    return Table(
        (grows, 8, "g"), ("selected", 10, "d"), ("visible", 9, "d"), ("ms", 11, ".1f"), ("p90", 11, ".1f"),
        ("ms/1000", 9, ".2f"), ("line", 11, ".1f"), ("off", 9, "+.1%"), ("attention", 11, ".1%"),
    )  # fmt: skip


def growth_rows(line: dict[str, Any], table: Table) -> Iterator[str]:
    """Yield the points of a sweep as rows, and a sentence about the line through them."""
    names = (
        "value", "tokens", "visible_tokens", "step_ms_median", "step_ms_p90", "ms_per_1000_tokens", "line_ms",
        "off_line", "attention_share",
    )  # fmt: skip
    for row in line["points"]:
        yield table.row(*(row[name] for name in names)) + ("" if row["is_fitted"] else "  not in the line")
    yield ""
    if line["fixed_ms"] is None:
        yield "no line: attention takes most of the step at too many points"
        return
    yield (
        f"line: {line['fixed_ms']:.1f} ms and {line['ms_per_1000_tokens']:.2f} ms for 1000 tokens; "
        f"linear within {line['worst_off_line']:.1%}"
    )


def _require_points(option: str, values: Sequence[float]) -> None:
    if values and len(set(values)) < max(LEAST_POINTS, len(values)):
        raise UserError(
            f"{option} {' '.join(map(str, values))} must name at least {LEAST_POINTS} different values, each once; "
            "two points do not test a line"
        )
