"""A good step and one with NaN gradients on the last rank, at every stage; run by test_training.py.

Reports the result of the second step, one line for each precision, stage and rank.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from everest_ds import distributed
from everest_ds.config import BatchConfig
from everest_ds.recipes import get_recipe
from everest_ds.train import engine as engines
from everest_ds.train.precision import PrecisionName
from everest_ds.train.step.updater import make_updater
from tests.integration.scanning import report, run_scan


class Task(torch.nn.Module):
    """One layer, trained to output zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "weight_decay": 0.0, "lr_scale": 1.0}]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).square().mean()


def main(world: distributed.World, device: torch.device) -> None:
    """Run every precision at every stage."""
    folder, *precisions = sys.argv[1:]
    config = replace(get_recipe("demo"), batch=BatchConfig(global_size=2 * world.size, micro_size=2))
    good, bad = torch.randn(2, 8), torch.full((2, 8), float("nan"))
    for precision in precisions:
        for stage in range(4):
            ds_config = engines.resolve_ds_config(
                engines.load_systems(Path(folder) / f"zero{stage}.json"),
                config,
                world_size=world.size,
                precision=cast(PrecisionName, precision),
                device_type="cpu",
            )
            engine = engines.build_engine(cast(Any, Task()), config, ds_config, device)
            updater = make_updater(engine, config.optim, ds_config)
            engines.set_learning_rate(engine, 0.1)
            dtype = next(engine.module.parameters()).dtype
            for x in (good, bad if world.rank == world.size - 1 else good):
                updater.forward_backward((x.to(dtype),))
                result = updater.step()
            assert result is not None
            optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
            (updates,) = {float(state["step"]) for state in optimizer.state.values()}
            report(
                precision=precision,
                stage=stage,
                rank=world.rank,
                applied=bool(result.applied),
                has_norm=math.isfinite(result.grad_norm),
                weights_are_fine=bool(engine(torch.ones(2, 8, dtype=dtype)).isfinite()),
                updates=updates,
            )


if __name__ == "__main__":
    run_scan(main)
