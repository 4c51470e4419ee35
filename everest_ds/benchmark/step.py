"""`everest benchmark step RECIPE`: clips a second, memory, utilisation, and where the time of a step goes.

Four measurements share the recipe, the flags and the way of printing: steps over micro-batches (`workbench`), ours
beside the official code (`compare`), the ways of sharding side by side (`sharding_sweep`), and steps whose work
grows (`growth`).
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.benchmark.compare import compare_steps
from everest_ds.benchmark.growth import sweep_growth
from everest_ds.benchmark.profile import measure_ceiling
from everest_ds.benchmark.sharding_sweep import sweep_stages
from everest_ds.benchmark.step_options import StepJob, StepOptions
from everest_ds.benchmark.step_report import (
    COMPARE_HEAD,
    STEP_HEAD,
    Report,
    compare_rows,
    describe_run,
    step_rows,
)
from everest_ds.benchmark.workbench import build_workbench, limit_memory, measure_steps, powers_of_two
from everest_ds.config import Config, PretrainConfig
from everest_ds.distributed import World, speaks_first
from everest_ds.errors import UserError
from everest_ds.train.precision import choose_precision

# Where `--micro-batch auto` begins on a GPU.
FIRST_OF_SWEEP = 8
EXIT_OUT_OF_MEMORY = 1


def run(job: StepJob, world: World) -> int:
    """Measure, print, and return the exit code: 0, or 1 where a stage failed, or memory ran out on several GPUs.

    Raises:
        UserError: There is no GPU, and an option needs one; see also `workbench`, `compare` and `sharding_sweep`.
    """
    config, options, sizes = job.config, job.options, job.sizes
    if options.sweep_stages:
        return sweep_stages(config, options)
    on_gpu = distributed.select_accelerator()
    if not on_gpu and sizes is None:
        raise UserError(
            "--micro-batch auto fills a GPU's memory, and there is none; name sizes: --micro-batch 1 2 4"
        )
    if not on_gpu and options.memory_gib is not None:
        raise UserError(f"--memory-gib {options.memory_gib} limits a GPU's memory, and there is none; leave it out")
    chosen: Iterable[int] = powers_of_two(FIRST_OF_SWEEP) if sizes is None else sizes
    if options.compare:
        assert isinstance(config, PretrainConfig)
        return _compare(config, options, chosen, world)
    if options.sweep_ratio or options.sweep_frames:
        return sweep_growth(config, options, sizes, world)
    return _measure(config, options, chosen, world)


def _measure(config: Config, options: StepOptions, sizes: Iterable[int], world: World) -> int:
    """Print a line for each micro-batch, until one does not fit."""
    first, sizes = _peek(sizes)
    limit_memory(options.memory_gib, world)
    bench = build_workbench(config, options.ds_config, options.precision, world, micro_size=first)
    ceiling = measure_ceiling(bench.device)
    same = {
        **describe_run("step", config, bench.device, **options.of_run),
        "gpus": world.size,
        "ds_config": None if options.ds_config is None else str(options.ds_config),
        **bench.describe(),
    }
    report = Report(world, same, head=STEP_HEAD, rows=step_rows, as_json=options.json)
    before: dict[str, Any] | None = None
    for size in sizes:
        distributed.barrier()  # a process that fails must not end the others before they have said what they know
        try:
            measured = measure_steps(
                bench, size, steps=options.steps, warmup=options.warmup, ceiling_tflops=ceiling
            )
        except torch.OutOfMemoryError:
            line: dict[str, Any] = {"micro_batch": size, "out_of_memory": True}
            if world.size == 1:
                report.print(line)
                break
            # The others wait for this process, whichever it is; it speaks, and its exit ends them.
            if speaks_first(f"out of memory {size}", world):
                report.print(line, of_any_rank=True)
            return EXIT_OUT_OF_MEMORY
        line = {"micro_batch": size, "out_of_memory": False, **measured}
        line["added_mb_per_clip"] = _added_per_clip(before, line)
        report.print(line)
        before = line
    distributed.finish()
    return 0


def _compare(config: PretrainConfig, options: StepOptions, sizes: Iterable[int], world: World) -> int:
    """Print a line for each micro-batch, and for tables each side's best one at the end."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision({}, options.precision, device.type)
    limit_memory(options.memory_gib, world)
    same = {
        **describe_run("step-compare", config, device, **options.of_run),
        "precision": precision.name,
        "time": "cpu" if device.type == "cpu" else "wall",
        "includes": "forward, backward",
        "threads": torch.get_num_threads(),
        "ceiling_tflops": measure_ceiling(device),
    }
    report = Report(world, same, head=COMPARE_HEAD, rows=compare_rows, as_json=options.json)
    best: dict[str, float] = {}
    for line in compare_steps(
        config,
        options.compare,
        sizes,
        precision=precision,
        device=device,
        rounds=options.steps,
        warmup=options.warmup,
    ):
        report.print(line)
        for name in ("ours", *options.compare):
            best[name] = max(best.get(name, 0.0), line.get(name, {}).get("clips_per_s", 0.0))
    if not options.json:
        print("\nat each side's best micro-batch: " + ", ".join(f"{n} {c:.2f} clips/s" for n, c in best.items()))
    return 0


def _peek(sizes: Iterable[int]) -> tuple[int, Iterator[int]]:
    """Return the first of some numbers, and all of them."""
    iterator = iter(sizes)
    first = next(iterator)
    return first, chain([first], iterator)


def _added_per_clip(before: dict[str, Any] | None, line: dict[str, Any]) -> float | None:
    """Return the MB that each further clip took, from one micro-batch to a larger one; None on a CPU."""
    if before is None or line["micro_batch"] <= before["micro_batch"] or line["peak_reserved_gib"] is None:
        return None
    gib = line["peak_allocated_gib"] - before["peak_allocated_gib"]
    return round(gib * 2**30 / 1e6 / (line["micro_batch"] - before["micro_batch"]), 3)
