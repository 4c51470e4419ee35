"""Two steps at every stage and precision, saved and exported; run by test_weights.py.

Rank zero reports one line a case: whether the file has the optimiser's float32 weights, and whether all of them are
bfloat16 values stored as float32.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file

from everest_ds import distributed
from everest_ds.config import BatchConfig, PretrainConfig
from everest_ds.recipes import get_recipe
from everest_ds.train import engine as engines
from everest_ds.train.checkpoints.consolidated import export_fp32
from everest_ds.train.checkpoints.run_dir import write_run_files
from everest_ds.train.checkpoints.save import TrainState, save_checkpoint
from everest_ds.train.precision import PrecisionName
from everest_ds.train.step.updater import make_updater
from everest_ds.train.tasks import PretrainTask
from tests.integration.scanning import report, run_scan

PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "bf16")


def live_weights(engine: Any, stage: int, precision: str) -> dict[str, torch.Tensor]:
    """The optimiser's float32 weights; a collective operation."""
    names = {p: name.removeprefix("model.") for name, p in engine.module.named_parameters()}
    if stage:
        return {name: safe_get_full_fp32_param(p) for p, name in names.items()}
    if precision == "fp32":
        return {name: p.detach() for p, name in names.items()}
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {names[low]: full for lows, fulls in pairs for low, full in zip(lows, fulls, strict=True)}


def train(engine: Any, config: PretrainConfig, ds_config: dict[str, Any], world: distributed.World) -> None:
    """Take two steps."""
    updater = make_updater(engine, config.optim, ds_config)
    engines.set_learning_rate(engine, 1e-3)
    for step in range(2):
        draw = torch.Generator().manual_seed(2 * step + world.rank)
        clips = torch.randint(0, 256, (1, 3, 16, 48, 48), dtype=torch.uint8, generator=draw)
        updater.forward_backward((clips, torch.rand(1, config.num_selected, generator=draw)))
        result = updater.step()
        assert result is not None
        assert result.applied


def main(world: distributed.World, device: torch.device) -> None:
    """Run every case."""
    ds_configs, out = map(Path, sys.argv[1:])
    config = replace(get_recipe("demo"), batch=BatchConfig(global_size=2, micro_size=1))
    assert isinstance(config, PretrainConfig)
    for stage, precision in ((stage, precision) for stage in range(4) for precision in PRECISIONS):
        systems = engines.load_systems(ds_configs / f"zero{stage}.json")
        ds_config = engines.resolve_ds_config(systems, config, world_size=2, precision=precision, device_type="cpu")
        torch.manual_seed(0)
        engine = engines.build_engine(PretrainTask(config), config, ds_config, device)
        train(engine, config, ds_config, world)
        run_dir = out / f"zero{stage}_{precision}"
        dtype = "bfloat16" if precision == "bf16" else "float32"
        state = TrainState(step=2, world_size=2, zero_stage=stage, dtype=dtype, videos="")
        save_checkpoint(engine, run_dir, state, world)
        live = live_weights(engine, stage, precision)
        if world.is_main:
            write_run_files(run_dir, config, ds_config)
            export_fp32(run_dir, out / f"{run_dir.name}.safetensors")
            written = load_file(out / f"{run_dir.name}.safetensors")
            report(
                stage=stage,
                precision=precision,
                num_tensors=len(written),
                is_live=written.keys() == live.keys() and all(torch.equal(written[n], live[n]) for n in live),
                is_bf16=all(torch.equal(w, w.bfloat16().float()) for w in written.values()),
            )
        distributed.barrier()


if __name__ == "__main__":
    run_scan(main)
