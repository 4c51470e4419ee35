"""Whether a training loop waits for its device between lines of metrics; run by test_waiting.py.

One process. On a CPU a wait is an operator that gives the host a value of a tensor, or a call of the accelerator's
`synchronize`; on a GPU, torch also raises an error. The first step may wait: DeepSpeed sets itself up in it.
Reports one line a case: waits between lines by step, and the lines of metrics.jsonl.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from everest_ds import distributed
from everest_ds.benchmark.steps.workbench import synthetic_batch
from everest_ds.config import BatchConfig, PretrainConfig, RunConfig
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.recipes import get_recipe
from everest_ds.train import engine as engines
from everest_ds.train.checkpoints.save import TrainState
from everest_ds.train.ema import WeightAverage
from everest_ds.train.engine import PrecisionName
from everest_ds.train.loop import Trainer
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.record.skipped_steps import SkippedSteps
from everest_ds.train.schedule import Schedule
from everest_ds.train.step.updater import make_updater
from everest_ds.train.tasks import PretrainTask
from tests.integration.scanning import report, run_scan

STEPS, LOG_EVERY, POISONED = 7, 3, 5
# Operators that need a tensor's values on the host, for their result or for its shape.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}


class Waits(TorchDispatchMode):
    """Collects waits between calls of `listen`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.listening = False
        self.device = device
        get_accelerator().synchronize = lambda *given: self.note("synchronize")

    def listen(self, listening: bool) -> None:
        """Start or stop collecting."""
        self.listening = listening
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if listening else "default")

    def note(self, what: str) -> None:
        """Record a wait."""
        if self.listening:
            self.seen.append(what)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator; record it if it waits."""
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING:
            self.note(name)
        return func(*args, **(kwargs or {}))


class PoisonedTask(PretrainTask):
    """A task whose loss is NaN in one step."""

    forwards = 0

    def forward(self, clips_BCTHW: Tensor, noise_BS: Tensor) -> Tensor:
        """Return the loss of a micro-batch; a step has two."""
        self.forwards += 1
        loss = super().forward(clips_BCTHW, noise_BS)
        return loss * float("nan") if self.forwards == 2 * POISONED else loss


class ListeningTrainer(Trainer):
    """A trainer that collects waits within steps, but not while it writes a line."""

    waits: Waits
    by_step: dict[int, list[str]]

    def _take_step(self, step: int, feed: Any) -> None:
        self.waits.seen = []
        self.waits.listen(step > self.schedule.start_step)
        super()._take_step(step, feed)
        self.waits.listen(False)
        self.by_step[step + 1] = self.waits.seen


def train(case: str, world: distributed.World, device: torch.device, folder: Path) -> dict[str, Any]:
    """Train one case, STAGE:PRECISION:CLIP, and return its figures."""
    stage, precision, max_norm = case.split(":")
    config = get_recipe("demo")
    assert isinstance(config, PretrainConfig)
    config = replace(
        config,
        data=replace(config.data, num_frames=4, image_size=32),
        batch=BatchConfig(global_size=4, micro_size=2),
        run=RunConfig(max_steps=STEPS, log_every_steps=LOG_EVERY),
        optim=replace(config.optim, max_grad_norm=float(max_norm)),
    )
    systems = {"zero_optimization": {"stage": int(stage), "overlap_comm": True}}
    if stage != "0":
        systems["data_types"] = {"grad_accum_dtype": "fp32"}  # type: ignore[dict-item]
    ds_config = engines.resolve_ds_config(
        systems, config, world_size=1, precision=cast(PrecisionName, precision), device_type=device.type
    )
    torch.manual_seed(0)
    task = PoisonedTask(config)
    engine = engines.build_engine(task, config, ds_config, device)
    batches = [synthetic_batch(task, 2, device, seed) for seed in range(2 * STEPS)]
    on_host = [replace(b, index_B=b.index_B.cpu(), frames_BT=b.frames_BT.cpu()) for b in batches]
    log = MetricsLog(folder)
    rows = [VideoRow(Path(f"{number}.mp4"), 0) for number in range(40)]
    trainer = ListeningTrainer(
        engine=engine,
        updater=make_updater(engine, config.optim, ds_config),
        task=task,
        config=config,
        schedule=Schedule.of(config, 40),
        world=world,
        device=device,
        run_dir=folder,
        log=log,
        start=TrainState(world_size=1, zero_stage=int(stage), dtype=precision, videos="40 videos, abc"),
        callbacks=[SkippedSteps(rows, log, allowed=1, count=0), WeightAverage(engine, 0.9)],
    )
    trainer._save = lambda taken: None  # type: ignore[method-assign]
    trainer.by_step = {}
    with Waits(device) as trainer.waits:
        trainer.run(iter(on_host))
    log.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines.pop()["event"] == "end"
    return {"waits": trainer.by_step, "lines": lines}


def main(world: distributed.World, device: torch.device) -> None:
    """Train all cases and report their figures."""
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    for case in cases:
        out = folder / case
        out.mkdir()
        report(case=case, **train(case, world, device, out))


if __name__ == "__main__":
    run_scan(main)
