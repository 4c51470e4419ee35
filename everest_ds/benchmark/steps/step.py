"""`everest benchmark step RECIPE`: clips a second, memory, utilisation, and the parts of a step's time.

Six measurements share the recipe and the flags: steps over micro-batches (here), our step and the official code's
(`compare`), flat gradients and DeepSpeed's own path (`gradient_paths`), blocking and background saves (`saves`),
ZeRO stages (`sharding_sweep`), and steps with more and more tokens (`growth`).
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.benchmark.options import StepJob, StepOptions
from everest_ds.benchmark.report import StepReport, Table, run_fields
from everest_ds.benchmark.steps.compare import benchmark_compare
from everest_ds.benchmark.steps.gradient_paths import compare_gradients
from everest_ds.benchmark.steps.growth import sweep_growth
from everest_ds.benchmark.steps.profiling import PARTS
from everest_ds.benchmark.steps.saves import compare_saves
from everest_ds.benchmark.steps.sharding_sweep import sweep_stages
from everest_ds.benchmark.steps.timing import measure_ceiling
from everest_ds.benchmark.steps.workbench import build_workbench, limit_memory, measure_steps
from everest_ds.config import Config, PretrainConfig
from everest_ds.distributed import World, speaks_first
from everest_ds.errors import UserError

# First micro-batch of `--micro-batch auto`.
FIRST_OF_SWEEP = 8
EXIT_OUT_OF_MEMORY = 1
TABLE = Table(
    ("micro", 6, "d"), ("clips/s", 10, ".2f"), ("tokens/s", 11, ".0f"), ("ms", 10, ".1f"), ("p90", 10, ".1f"),
    ("GiB", 8, ".2f"), ("reserved", 9, ".2f"), ("MB/clip", 9, ".1f"), ("MFU", 7, ".1%"), ("sheet", 7, ".1%"),
    ("attention", 11, ".1%"), ("linear", 7, ".1%"), ("other", 6, ".1%"), ("optimiser", 10, ".1%"),
    ("comm", 5, ".1%"), ("aten", 7, "d"), ("launches", 9, "d"),
)  # fmt: skip
KERNELS = Table(("ms", 16, ".3f"), ("share", 7, ".1%"), ("times", 9, ".1f"), ("  kernel", 0, "<"))


def run(job: StepJob, world: World) -> int:
    """Measure, print, and return the exit code: 1 if a stage failed or several GPUs ran out of memory, else 0."""
    config, options, sizes = job.config, job.options, job.sizes
    if options.sweep_stages:
        return sweep_stages(config, options)
    on_gpu = distributed.select_accelerator()
    if not on_gpu and sizes is None:
        raise UserError(
            "--micro-batch auto needs a GPU, and there is none; name sizes, for example --micro-batch 1 2 4"
        )
    if not on_gpu and options.memory_gib is not None:
        raise UserError(f"--memory-gib {options.memory_gib} needs a GPU, and there is none; remove it")
    if options.compare_gradients:
        return compare_gradients(config, options, sizes, world)
    if options.compare_saves:
        return compare_saves(config, options, sizes, world)
    if options.sweep_ratio or options.sweep_frames:
        return sweep_growth(config, options, sizes, world)
    doubled = (FIRST_OF_SWEEP << doublings for doublings in itertools.count())
    if options.compare:
        assert isinstance(config, PretrainConfig)
        return benchmark_compare(config, options, sizes or doubled, world)
    return _measure(config, options, sizes or doubled, FIRST_OF_SWEEP if sizes is None else sizes[0], world)


def _measure(config: Config, options: StepOptions, sizes: Iterable[int], first: int, world: World) -> int:
    """Print a line for each micro-batch until memory runs out."""
    limit_memory(options.memory_gib, world)
    bench = build_workbench(config, options.ds_config, options.precision, world, micro_size=first)
    ceiling = measure_ceiling(bench.device)
    common = {
        **run_fields("step", config, bench.device, options),
        "gpus": world.size,
        **bench.settings,
    }
    report = StepReport(world, common, TABLE, _rows, as_json=options.json)
    before: dict[str, Any] | None = None
    for size in sizes:
        distributed.barrier()  # a failing process must not end the others before they have printed
        try:
            steps, warmup = options.steps, options.warmup
            measured = measure_steps(
                bench, size, steps=steps, warmup=warmup, ceiling_tflops=ceiling, num_kernels=options.kernels
            )
        except torch.OutOfMemoryError:
            line: dict[str, Any] = {"micro_batch": size, "out_of_memory": True}
            if world.size == 1:
                report.print(line)
                break
            # The other ranks wait for this one, whichever it is. It prints, and its exit ends them.
            if speaks_first(f"out of memory {size}", world):
                report.print(line, from_any_rank=True)
            return EXIT_OUT_OF_MEMORY
        line = {"micro_batch": size, "out_of_memory": False, **measured}
        line["added_mb_per_clip"] = _added_per_clip(before, line)
        report.print(line)
        before = line
    distributed.finish()
    return 0


def _added_per_clip(before: dict[str, Any] | None, line: dict[str, Any]) -> float | None:
    """Return the MB of each additional clip, from the previous micro-batch to a larger one; None on a CPU."""
    if before is None or line["micro_batch"] <= before["micro_batch"] or line["peak_reserved_gib"] is None:
        return None
    gib = line["peak_allocated_gib"] - before["peak_allocated_gib"]
    return round(gib * 2**30 / 1e6 / (line["micro_batch"] - before["micro_batch"]), 3)


def _rows(line: dict[str, Any]) -> Iterator[str]:
    if line["out_of_memory"]:
        yield f"{line['micro_batch']:>6}  out of memory"
        return
    names = (
        "micro_batch", "clips_per_s", "tokens_per_s", "step_ms_median", "step_ms_p90", "peak_allocated_gib",
        "peak_reserved_gib", "added_mb_per_clip", "mfu", "mfu_data_sheet",
    )  # fmt: skip
    shares = (line["shares"] or dict.fromkeys(PARTS)).values()
    yield TABLE.row(*(line[name] for name in names), *shares, line["aten_calls"], line["kernel_launches"])
    if line["kernels"]:
        yield KERNELS.head
    for kernel in line["kernels"]:
        yield KERNELS.row(kernel["ms"], kernel["share"], kernel["times"], f"  {kernel['name']}")
