"""A few steps at every ZeRO stage in one precision; run by test_precision.py.

Rank zero reports one line a stage: losses, gradient norms, and the dtypes of weights as layers see them and of the
gradients and weights that are communicated.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from everest_ds import distributed
from everest_ds.config import BatchConfig, PretrainConfig
from everest_ds.recipes import get_recipe
from everest_ds.train import engine as engines
from everest_ds.train.precision import PrecisionName
from everest_ds.train.step.updater import make_updater
from everest_ds.train.tasks import make_task
from tests.integration.scanning import report, run_scan

CLIPS, STEPS, LEARNING_RATE = 8, 4, 1e-3
# Smaller tensors are scalars: norms, losses, whether a gradient is finite.
LEAST_ELEMENTS = 100


@contextlib.contextmanager
def watch_collectives(seen: set[str]) -> Iterator[None]:
    """Note the dtype of every tensor that DeepSpeed and flat gradients send."""
    import deepspeed.comm.comm as comm

    def watched(owner: Any, name: str) -> Any:
        send = getattr(owner, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            for given in (*args, *kwargs.values()):
                tensors = given if isinstance(given, list | tuple) else [given]
                seen.update(
                    str(tensor.dtype) for tensor in tensors
                    if isinstance(tensor, torch.Tensor) and tensor.numel() >= LEAST_ELEMENTS
                )  # fmt: skip
            return send(*args, **kwargs)

        return mock.patch.object(owner, name, collective)

    own = [
        (distributed, "reduce_scatter_single"),
        (distributed, "all_gather_single"),
        (torch.distributed, "all_reduce"),
    ]
    deepspeeds = [(comm.cdb, name) for name in dir(comm.cdb) if "reduce" in name or "gather" in name]
    with contextlib.ExitStack() as stack:
        for owner, name in (*own, *deepspeeds):
            if callable(getattr(owner, name)):
                stack.enter_context(watched(owner, name))
        yield


def run_stage(
    config: PretrainConfig, ds_config: dict[str, Any], world: distributed.World, device: torch.device
) -> dict[str, Any]:
    """Take the steps and return the figures."""
    sent: set[str] = set()
    weights: set[str] = set()
    torch.manual_seed(0)
    task = make_task(config)
    for module in task.modules():
        own = list(module.parameters(recurse=False))
        if own:
            module.register_forward_hook(
                lambda module, *_: weights.update(str(p.dtype) for p in module.parameters(recurse=False))
            )
    engine = engines.build_engine(task, config, ds_config, device)
    engine.train()
    updater = make_updater(engine, config.optim, ds_config)
    micro_size, accumulation = config.batch.micro_size, engine.gradient_accumulation_steps()
    losses, norms = [], []
    generator = torch.Generator().manual_seed(0)
    with watch_collectives(sent):
        for _ in range(STEPS):
            frames, edge = config.data.num_frames, config.data.image_size
            clips = torch.randint(0, 256, (CLIPS, 3, frames, edge, edge), dtype=torch.uint8, generator=generator)
            noise = torch.rand(CLIPS, config.num_selected, generator=generator)
            engines.set_learning_rate(engine, LEARNING_RATE)
            total = 0.0
            for turn in range(accumulation):
                first = (world.rank * accumulation + turn) * micro_size
                last = first + micro_size
                loss = updater.forward_backward((clips[first:last], noise[first:last]))
                result = updater.step()
                total += loss.item() / accumulation
            losses.append(sum(distributed.gather_objects(total)) / world.size)
            assert result is not None
            norms.append(float(result.grad_norm))
    return {"losses": losses, "norms": norms, "weights": sorted(weights), "sent": sorted(sent)}


def main(world: distributed.World, device: torch.device) -> None:
    """Run all stages."""
    folder, precision, micro_size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = get_recipe("demo")
    assert isinstance(config, PretrainConfig)
    config = replace(
        config,
        data=replace(config.data, num_frames=8, image_size=32),
        batch=BatchConfig(global_size=CLIPS, micro_size=micro_size),
    )
    for stage in range(4):
        systems = engines.load_systems(folder / f"zero{stage}.json")
        ds_config = engines.resolve_ds_config(
            systems,
            config,
            world_size=world.size,
            precision=cast(PrecisionName, precision),
            device_type="cpu",
        )
        seen = run_stage(config, ds_config, world, device)
        if world.is_main:
            report(stage=stage, **seen)


if __name__ == "__main__":
    run_scan(main)
