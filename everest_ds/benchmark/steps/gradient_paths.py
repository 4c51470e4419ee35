"""`everest benchmark step RECIPE --compare-gradients zero2`: flat gradients compared with DeepSpeed's own path.

Both paths start from the same weights and use the same clips, each with its own engine in the same process. Their
steps are interleaved. Only the host's work between the model's operators differs, so a model with many layers and
negligible width (`--model.size thin`) shows the difference best.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from everest_ds import distributed
from everest_ds.benchmark.options import StepOptions
from everest_ds.benchmark.report import StepReport, Table, rounded, run_fields
from everest_ds.benchmark.steps.profiling import profile_step
from everest_ds.benchmark.steps.sharding_sweep import named_files
from everest_ds.benchmark.steps.timing import Side, interleave, step_times
from everest_ds.benchmark.steps.workbench import (
    Workbench,
    build_workbench,
    limit_memory,
    synthetic_batch,
    take_step,
)
from everest_ds.config import Config, GradientsName
from everest_ds.distributed import World
from everest_ds.errors import UserError

# Each path is compared with the first.
PATHS: tuple[GradientsName, ...] = ("deepspeed", "flat")
TABLE = Table(
    ("file", 14, "<"), ("gradients", 10, "<"), ("ms", 9, ".2f"), ("p90", 9, ".2f"), ("ratio", 7, ".3f"),
    ("aten", 7, "d"), ("forward", 9, "d"), ("backward", 9, "d"), ("update", 9, "d"), ("launches", 9, "d"),
    ("loss", 12, ".6f"),
)  # fmt: skip


def compare_gradients(config: Config, options: StepOptions, sizes: Sequence[int] | None, world: World) -> int:
    """Measure both paths with every file, print a line for each, and return 0."""
    files = named_files("--compare-gradients", options.compare_gradients)
    if sizes is None or len(sizes) > 1:
        raise UserError(
            f"--compare-gradients needs one micro-batch, got --micro-batch {' '.join(options.micro_batch)}; "
            "name one number"
        )
    limit_memory(options.memory_gib, world)
    report: StepReport | None = None
    for name, path in files.items():
        benches = {
            gradients: _build(config, options, path, gradients, world, sizes[0]) for gradients in reversed(PATHS)
        }
        bench = benches["flat"]
        common = {
            **run_fields("step-gradients", config, bench.device, options),
            "gpus": world.size,
            "precision": bench.settings["precision"],
            "time": "cpu" if bench.device.type == "cpu" else "wall",
            "micro_batch": sizes[0],
        }
        report = report or StepReport(world, common, TABLE, _rows, as_json=options.json)
        stage = bench.settings["zero_stage"]
        report.print({"ds_config": name, "zero_stage": stage, "paths": _measure(benches, sizes[0], options)})
        del bench, benches
        gc.collect()
    distributed.finish()
    return 0


def _build(
    config: Config, options: StepOptions, path: Path, gradients: GradientsName, world: World, micro_size: int
) -> Workbench:
    config = replace(config, optim=replace(config.optim, gradients=gradients))
    return build_workbench(config, path, options.precision, world, micro_size=micro_size)


def _measure(benches: dict[GradientsName, Workbench], micro_size: int, options: StepOptions) -> dict[str, Any]:
    """Return times, calls and launches of a step by path; ``ratio`` is the median time over the first path's."""
    sides: dict[GradientsName, Side] = {}
    for name in PATHS:
        bench = benches[name]
        seed = bench.task.config.run.seed + bench.world.rank
        batch = synthetic_batch(bench.task, micro_size, bench.device, seed)
        sides[name] = Side(name, partial(_step, bench, bench.task.inputs(batch, bench.device)))
    device = benches[PATHS[0]].device
    times = interleave(list(sides.values()), device, rounds=options.steps, warmup=options.warmup)
    paths: dict[str, Any] = {}
    for name, side in sides.items():
        profiled = profile_step(device, side.step, num_kernels=options.kernels)
        measured = step_times(times[name].seconds)
        first = paths[PATHS[0]]["step_ms_median"] if paths else measured["step_ms_median"]
        ratio = rounded(measured["step_ms_median"] / first)
        paths[name] = {**measured, "ratio": ratio, "loss": times[name].loss, **profiled.fields()}
    return paths


def _step(bench: Workbench, inputs: Any) -> float:
    return float(take_step(bench, inputs))


def _rows(line: dict[str, Any]) -> Iterator[str]:
    names = ("step_ms_median", "step_ms_p90", "ratio", "aten_calls")
    for gradients, path in line["paths"].items():
        measured, phases = (path[name] for name in names), path["aten_calls_by_phase"].values()
        yield TABLE.row(line["ds_config"], gradients, *measured, *phases, path["kernel_launches"], path["loss"])
