"""Losses of a demo pre-training with all fast paths on, or all off; run by test_loss_curves.py.

One process with DeepSpeed's engine at ZeRO-2 trains on generated clips of drifting textures. Reports one line of
losses a precision.
"""

import itertools
import sys
from dataclasses import replace
from typing import cast

import torch
from torch.nn import functional as F

from everest_ds import distributed
from everest_ds.config import BatchConfig, PretrainConfig
from everest_ds.model import transformer as compilation
from everest_ds.model import tubelets
from everest_ds.recipes import get_recipe
from everest_ds.train import engine as engines
from everest_ds.train.engine import PrecisionName
from everest_ds.train.step.updater import make_updater
from everest_ds.train.tasks import make_task
from tests.integration.scanning import report, run_scan

CLIPS, BATCHES, FRAMES, EDGE = 4, 16, 8, 32
PEAK_LR = 5e-4  # twice the recipe's for so few clips
PATHS = {
    "off": {"attention": "sdpa", "activation_checkpointing": False},
    "on": {
        "attention": "auto",
        "activation_checkpointing": True,
        "recompute_attention": False,
        "compile_blocks": True,
    },
}


def choose_ways(paths: str) -> None:
    """Turn on or off the fast paths without a setting: ranking on GPUs, and the fused step without waits."""
    if paths == "on":
        tubelets.has_exact_matmul = lambda device: True  # type: ignore[assignment]
        return
    engines.make_optimizer = lambda groups, config: torch.optim.AdamW(
        groups, lr=0.0, betas=config.betas, eps=config.eps, foreach=False, fused=False
    )


def make_batches(num_noise: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Clips whose texture drifts by up to two pixels a frame, and noise for their selection."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        coarse = torch.rand(CLIPS, 3, EDGE // 4, EDGE // 4, generator=generator)
        image = F.interpolate(coarse, size=(EDGE, EDGE), mode="bilinear").mul(255).byte()
        drift = torch.randint(-2, 3, (CLIPS, 2), generator=generator).tolist()
        clips = [
            torch.stack([one.roll((dy * t, dx * t), (1, 2)) for t in range(FRAMES)], dim=1)
            for one, (dy, dx) in zip(image, drift, strict=True)
        ]
        batches.append((torch.stack(clips), torch.rand(CLIPS, num_noise, generator=generator)))
    return batches


def train(paths: str, precision: str, steps: int, world: distributed.World, device: torch.device) -> list[float]:
    """Train from the same weights on the same batches in every call, and return the losses."""
    config = get_recipe("demo")
    assert isinstance(config, PretrainConfig)
    config = replace(
        config,
        data=replace(config.data, num_frames=FRAMES, image_size=EDGE),
        batch=BatchConfig(global_size=CLIPS, micro_size=CLIPS),
        model=replace(config.model, **PATHS[paths]),
        optim=replace(config.optim, gradients="flat" if paths == "on" else "deepspeed"),
    )
    engines.check_compilation(config, engines.DEFAULT_SYSTEMS, "cpu")
    ds_config = engines.resolve_ds_config(
        engines.DEFAULT_SYSTEMS,
        config,
        world_size=world.size,
        precision=cast(PrecisionName, precision),
        device_type="cpu",
    )
    torch.manual_seed(0)
    engine = engines.build_engine(make_task(config), config, ds_config, device)
    updater = make_updater(engine, config.optim, ds_config)
    engine.train()
    losses = []
    batches = itertools.cycle(make_batches(config.num_selected))
    for step, (clips, noise) in enumerate(itertools.islice(batches, steps)):
        engines.set_learning_rate(engine, PEAK_LR * min(1, step / 20))
        loss = updater.forward_backward((clips, noise))
        updater.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


def main(world: distributed.World, device: torch.device) -> None:
    """Train in each precision."""
    paths, steps, *precisions = sys.argv[1:]
    choose_ways(paths)
    if compilation.compile_obstacle("cpu") is not None:
        compilation.COMPILE_BACKEND = "aot_eager"
    for precision in precisions:
        losses = train(paths, precision, int(steps), world, device)
        report(precision=precision, backend=str(compilation.COMPILE_BACKEND), losses=losses)


if __name__ == "__main__":
    run_scan(main)
