"""Cost of watching a run, interleaved with the same step without it; run by test_hangs.py.

Reports one line a rank: medians over the steps of wall time and of this thread's CPU time, in milliseconds. `signs`
are what a rank writes every five seconds and reads if it is late; here that is done in every step.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from everest_ds import distributed, pulse
from everest_ds.benchmark.steps.workbench import build_workbench, synthetic_batch
from everest_ds.recipes import get_recipe
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.watch.watchdog import Watchdog
from everest_ds.train.watch.weights import SameWeights
from tests.integration.scanning import report, run_scan

PHASES = ("between steps", pulse.WAITING_FOR_CLIPS, "computing gradients", "updating weights")


def main(world: distributed.World, device: torch.device) -> None:
    """Run `size micro_size steps ds_config` steps."""
    size, micro_size, steps, ds_config = sys.argv[1:]
    config = get_recipe("demo")
    config = replace(config, model=replace(config.model, size=size))
    bench = build_workbench(config, Path(ds_config), "fp32", world, micro_size=int(micro_size))
    inputs = bench.task.inputs(synthetic_batch(bench.task, int(micro_size), device, world.rank), device)
    folder = Path(tempfile.mkdtemp())
    log = MetricsLog(folder, is_main=False)
    same = SameWeights(bench.engine, folder, world, log, every=100, start_step=0)
    watchdog = Watchdog(folder, world, hang_after_s=60.0, loader_s=0.0)
    taken: dict[str, list[tuple[float, float]]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter(), time.thread_time()
        work()
        spent = time.perf_counter() - began[0], time.thread_time() - began[1]
        taken.setdefault(name, []).append((spent[0] * 1e3, spent[1] * 1e3))

    def look() -> None:
        watchdog._say()
        watchdog._read()

    with watchdog.watching():
        for step in range(1, int(steps) + 1):
            timed("compute", lambda: bench.updater.forward_backward(inputs))
            timed("checksum", lambda step=step: same.before_update(step))
            timed("update", bench.updater.step)
            timed("phases", lambda: [pulse.enter(phase) for phase in PHASES])
            timed("signs", look)
        timed("comparison", same._compare)
    medians = {
        name: [round(statistics.median(column), 4) for column in zip(*times[int(steps) // 10 :], strict=True)]
        for name, times in taken.items()
        if name != "comparison"
    }
    parameters = sum(p.numel() for p in bench.task.parameters())
    report(rank=world.rank, parameters=parameters, comparison=taken["comparison"], **medians)


if __name__ == "__main__":
    run_scan(main)
