"""A few steps at ZeRO-3 with each kind of recomputation; run by test_recomputation.py.

Reports one line a case and rank: the losses and a sum over the gathered weights, which depends on all gradients.
"""

from dataclasses import replace

import torch

from everest_ds import distributed
from everest_ds.config import BatchConfig, Config, FinetuneConfig, FinetuneDataConfig
from everest_ds.recipes import get_recipe
from everest_ds.train import engine as engines
from everest_ds.train.engine import PrecisionName
from everest_ds.train.step.updater import make_updater
from everest_ds.train.tasks import make_task
from tests.integration.scanning import report, run_scan

# model.activation_checkpointing and model.recompute_attention.
RECOMPUTED = {"nothing": (False, True), "all but attention": (True, False), "all": (True, True)}
STEPS = 3
MICRO_SIZE = 2
NUM_CLASSES = 3
# Partition small parameters too, so that a weight that is read outside its module is missing.
SYSTEMS = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def make_config(recipe: str, world_size: int) -> Config:
    config = get_recipe(recipe)
    data = {"image_size": 32, "num_frames": 4}
    config = replace(config, batch=BatchConfig(global_size=MICRO_SIZE * world_size, micro_size=MICRO_SIZE))
    if isinstance(config, FinetuneConfig):
        model = replace(config.model, drop_path=0.5)
        return replace(config, data=FinetuneDataConfig(num_classes=NUM_CLASSES, **data), model=model)
    return replace(config, data=replace(config.data, **data))


def make_inputs(config: Config, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    frames, edge = config.data.num_frames, config.data.image_size
    shape = (MICRO_SIZE, 3, frames, edge, edge)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if isinstance(config, FinetuneConfig):
        target = torch.randint(0, NUM_CLASSES, (MICRO_SIZE,), generator=generator)
        num_noise = make_task(config).model.num_noise(config.grid)
        return clips, target, torch.rand(MICRO_SIZE, num_noise, generator=generator)
    return clips, torch.rand(MICRO_SIZE, config.num_selected, generator=generator)


def run_case(
    config: Config, precision: PrecisionName, world: distributed.World, device: torch.device
) -> list[float]:
    """Take steps; return their losses, followed by the sum of all weights' magnitudes."""
    import deepspeed

    ds_config = engines.resolve_ds_config(
        SYSTEMS, config, world_size=world.size, precision=precision, device_type="cpu"
    )
    torch.manual_seed(0)
    engine = engines.build_engine(make_task(config), config, ds_config, device)
    updater = make_updater(engine, config.optim, ds_config)
    engine.train()
    engines.set_learning_rate(engine, 1e-3)
    generator = torch.Generator().manual_seed(world.rank)
    figures = []
    for _ in range(STEPS):
        loss = updater.forward_backward(make_inputs(config, generator))
        updater.step()
        figures.append(loss.item())
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        figures.append(sum(p.double().abs().sum().item() for p in engine.module.parameters()))
    engine.destroy()
    return figures


def main(world: distributed.World, device: torch.device) -> None:
    """Run both tasks, one in float32 and one in bf16, with each kind of recomputation."""
    cases: dict[str, PrecisionName] = {"demo": "fp32", "demo_ft": "bf16"}
    for recipe, precision in cases.items():
        config = make_config(recipe, world.size)
        for name, (on, attention_too) in RECOMPUTED.items():
            model = replace(config.model, activation_checkpointing=on, recompute_attention=attention_too)
            figures = run_case(replace(config, model=model), precision, world, device)
            report(case=f"{recipe} {precision}", recomputed=name, rank=world.rank, figures=figures)


if __name__ == "__main__":
    run_scan(main)
