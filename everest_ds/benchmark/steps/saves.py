"""`everest benchmark step RECIPE --compare-saves`: how long blocking and background saves stop the training.

Blocking saves and background saves of one engine are interleaved, each after a step. During a background save,
further steps are taken, as in training, so that its cost to them is measured too. Checkpoints are written below the
current folder and removed.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.benchmark.options import StepOptions
from everest_ds.benchmark.report import StepReport, Table, rounded, run_fields
from everest_ds.benchmark.steps.workbench import (
    Workbench,
    build_workbench,
    limit_memory,
    synthetic_batch,
    take_step,
)
from everest_ds.config import Config
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.checkpoints.listing import folder_of
from everest_ds.train.checkpoints.save import Keeping, TrainState
from everest_ds.train.checkpoints.saving.saves import Saved, Saves
from everest_ds.train.checkpoints.saving.writer import Writer, writing

TABLE = Table(
    ("save", 12, "<"), ("stall ms", 10, ".1f"), ("first", 9, ".1f"), ("longest", 9, ".1f"), ("share", 8, ".1%"),
    ("complete s", 12, ".2f"), ("step ms", 9, ".1f"), ("MiB", 8, ".0f"),
)  # fmt: skip
STANDING, BEHIND = "standing", "behind"
KEEPING = Keeping(keep_last=1, keep_every_steps=None, best_step=None)


def compare_saves(config: Config, options: StepOptions, sizes: Sequence[int] | None, world: World) -> int:
    """Measure both ways, `steps` saves each, print a line for each way, and return 0."""
    if sizes is None or len(sizes) > 1:
        raise UserError(f"--compare-saves with --micro-batch {' '.join(options.micro_batch)}: name one number")
    limit_memory(options.memory_gib, world)
    with writing(behind=True) as writer:
        bench = build_workbench(config, options.ds_config, options.precision, world, micro_size=sizes[0])
        common = {
            **run_fields("step-saves", config, bench.device, options),
            "gpus": world.size,
            "micro_batch": sizes[0],
            **bench.settings,
        }
        report = StepReport(world, common, TABLE, _rows, as_json=options.json)
        with tempfile.TemporaryDirectory(dir=".", prefix="saves-") as made:
            folder = Path(distributed.gather_objects(made)[0]).resolve()
            ways = _measure(bench, writer, folder, sizes[0], options)
            distributed.barrier()
    report.print({"ways": ways})
    distributed.finish()
    return 0


def _measure(
    bench: Workbench, writer: Writer | None, folder: Path, micro_size: int, options: StepOptions
) -> dict[str, Any]:
    """Return the measurements by way of saving. A stall is that of the slowest rank."""
    inputs = bench.task.inputs(
        synthetic_batch(bench.task, micro_size, bench.device, bench.world.rank), bench.device
    )
    for _ in range(max(options.warmup, 1)):  # the first step may create the optimiser's states
        _timed_step(bench, inputs)
    saved: dict[str, list[Saved]] = {STANDING: [], BEHIND: []}
    steps_ms: dict[str, list[float]] = {STANDING: [], BEHIND: []}
    stalls_s: dict[str, list[float]] = {STANDING: [], BEHIND: []}
    ways = {
        name: Saves(engine=bench.engine, run_dir=folder, world=bench.world, on_saved=saved[name].append, writer=by)
        for name, by in ((STANDING, None), (BEHIND, writer))
    }
    ways[BEHIND].reserve()
    for number in range(2 * options.steps):
        name = (STANDING, BEHIND)[number % 2]
        distributed.barrier()
        began = time.perf_counter()
        ways[name].save(_state(bench, number + 1), KEEPING)
        stalls_s[name].append(max(distributed.gather_objects(time.perf_counter() - began)))
        while not steps_ms[name] or len(saved[name]) < len(stalls_s[name]):
            steps_ms[name].append(_timed_step(bench, inputs))
            ways[name].poll()
        steps_ms[name].append(_timed_step(bench, inputs)) if name == STANDING else None
    num_bytes = sum(path.stat().st_size for path in folder_of(folder).rglob("*") if path.is_file())
    standing_s = statistics.median(stalls_s[STANDING])
    return {
        name: {
            "stall_ms_median": rounded(1e3 * statistics.median(stalls)),
            "stall_ms_first": rounded(1e3 * stalls[0]),
            "stall_ms_longest": rounded(1e3 * max(stalls)),
            "share": rounded(statistics.median(stalls) / standing_s),
            "complete_s_median": rounded(statistics.median(one.took_s for one in saved[name])),
            "step_ms_median": rounded(statistics.median(steps_ms[name])),
            "mib": rounded(num_bytes / 2**20, 1),
        }
        for name, stalls in stalls_s.items()
    }


def _timed_step(bench: Workbench, inputs: Any) -> float:
    began = time.perf_counter()
    take_step(bench, inputs)
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)
    return 1e3 * (time.perf_counter() - began)


def _state(bench: Workbench, step: int) -> TrainState:
    return TrainState(
        step=step,
        world_size=bench.world.size,
        zero_stage=bench.settings["zero_stage"],
        dtype="bfloat16" if bench.engine.bfloat16_enabled() else "float32",
        videos="synthetic",
    )


def _rows(line: dict[str, Any]) -> Iterator[str]:
    for name, way in line["ways"].items():
        yield TABLE.row(name, *way.values())
