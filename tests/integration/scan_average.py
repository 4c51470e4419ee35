"""The moving average under DeepSpeed; run by test_average.py, reports one line of JSON a case and rank.

Each case trains a tiny model for some steps and averages it twice: with `WeightAverage`, and in plain Python from
the full weights after every step. The same steps without an average show whether swapping changes the training.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.config import BatchConfig, PretrainDataConfig
from everest_ds.recipes import get_recipe
from everest_ds.train import engine as engines
from everest_ds.train.checkpoints.saving.files import FilesInFolder
from everest_ds.train.ema import WeightAverage, read_average
from everest_ds.train.step.updater import make_updater
from everest_ds.train.tasks import PretrainTask
from tests.integration.scanning import report, run_scan

DECAY, STEPS = 0.7, 5
CONFIG = replace(get_recipe("demo"), data=PretrainDataConfig(image_size=32, num_frames=4))
FROZEN = "model.encoder.patch_embed.proj.weight"
Weights = dict[str, torch.Tensor]


def whole_weights(engine: Any) -> Weights:
    """Every trained parameter as forward reads it: gathered if it is partitioned."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
                found[name.removeprefix("model.")] = parameter.detach().clone()
    if any(getattr(p, "ds_persist", False) for p in engine.module.parameters()):
        engine.optimizer.checkpoint_event_epilogue()  # leaving the context above also released the small parameters
    return found


def persistent(engine: Any) -> Weights:
    """The small parameters of ZeRO-3, which stay gathered; read in place."""
    named = engine.module.named_parameters()
    small = {name.removeprefix("model."): p for name, p in named if getattr(p, "ds_persist", False)}
    return {name: p.detach().clone() for name, p in small.items() if p.requires_grad}


def evaluate(engine: Any, clips: torch.Tensor, noise: torch.Tensor) -> float:
    engine.eval()
    with torch.no_grad():
        loss = engine(clips, noise)
    engine.train()
    return float(loss)


def plain_loss(weights: Weights, start: Weights, dtype: torch.dtype, inputs: tuple[torch.Tensor, ...]) -> float:
    """The loss of a model outside DeepSpeed with these weights."""
    task = PretrainTask(CONFIG)
    task.load_state_dict(start)
    task.model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return float(task.to(dtype)(*inputs))


def train(case: str, world: distributed.World, device: torch.device, folder: Path | None) -> tuple[Weights, dict]:
    """Train one case; with a folder also average, swap in the middle and at the end, and save there."""
    stage, precision = case.split(":")
    config = replace(CONFIG, batch=BatchConfig(global_size=2 * world.size, micro_size=1))
    zero: dict[str, Any] = {"stage": int(stage)}
    if stage == "3":  # some parameters stay gathered, some do not
        zero["stage3_param_persistence_threshold"] = 2000
    systems: dict[str, Any] = {"zero_optimization": zero}
    if stage != "0":
        systems["data_types"] = {"grad_accum_dtype": "fp32"}
    ds_config = engines.resolve_ds_config(
        systems, config, world_size=world.size, precision=precision, device_type="cpu"
    )
    torch.manual_seed(0)
    task = PretrainTask(config)
    task.get_parameter(FROZEN).requires_grad_(False)
    start = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    engine = engines.build_engine(task, config, ds_config, device)
    updater = make_updater(engine, config.optim, ds_config)
    engine.train()
    engines.set_learning_rate(engine, 1e-2)
    generator = torch.Generator().manual_seed(world.rank)
    average = WeightAverage(engine, DECAY) if folder else None
    expected = {name: tensor.double() for name, tensor in whole_weights(engine).items()} if folder else {}
    seen: dict[str, Any] = {"restored": [], "losses": []}
    for step in range(STEPS):
        for _ in range(2):
            clips = torch.randint(0, 256, (1, 3, 4, 32, 32), dtype=torch.uint8, generator=generator)
            inputs = clips, torch.rand(1, config.num_selected, generator=generator)
            updater.forward_backward(inputs)
            result = updater.step()
        if average is None:
            continue
        assert result is not None
        average.update(result.applied)
        before = whole_weights(engine)
        for name, tensor in before.items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * tensor.double()
        if step not in (1, STEPS - 1):
            continue
        evaluate(engine, *inputs)  # some parameters may stay gathered after it
        with average.swapped():
            small = persistent(engine)
            found = evaluate(engine, *inputs)
            dtype = next(iter(before.values())).dtype
            averages = {name: tensor.to(dtype) for name, tensor in average.whole()}
            seen["losses"].append((found, plain_loss(averages, start, dtype, inputs)))
            seen["small"] = len(small)
            assert all(torch.equal(small[name], averages[name]) for name in small)
            inside = whole_weights(engine)
            assert all(torch.equal(inside[name], averages[name]) for name in averages)
        seen["moved"] = max(float((averages[name] - before[name]).abs().max()) for name in before)
        after, small = whole_weights(engine), persistent(engine)
        seen["restored"].append(all(torch.equal(after[name], before[name]) for name in before))
        seen["restored"].append(all(torch.equal(small[name], before[name]) for name in small))
    if average is not None and folder is not None:
        average.write_checkpoint(FilesInFolder(folder))
        distributed.barrier()
        saved = read_average(folder)
        assert saved.keys() == expected.keys()
        assert FROZEN.removeprefix("model.") not in saved
        pairs = [(saved[name].double(), expected[name]) for name in saved]
        seen["worst"] = max(float(((a - b).abs() / (b.abs() + 1e-3)).max()) for a, b in pairs)
        seen["bytes"] = sum(tensor.nbytes for tensor in average._slices.values())
        seen["parameters"] = sum(tensor.numel() for tensor in saved.values())
        fresh = WeightAverage(engine, DECAY)
        for other in sorted(folder.parent.glob("[0-3]:*/ema.safetensors")):  # also those of earlier cases
            again = folder.parent / f"again {folder.name}, {other.parent.name}"
            again.mkdir(exist_ok=True)
            fresh.load(other.parent)
            fresh.write_checkpoint(FilesInFolder(again))
            distributed.barrier()
            there, back = read_average(other.parent), read_average(again)
            assert there.keys() == back.keys()
            seen["restored"].append(all(torch.equal(there[name], back[name]) for name in there))
    weights = whole_weights(engine)
    engine.destroy()
    return weights, seen


def main(world: distributed.World, device: torch.device) -> None:
    """Run each case, STAGE:PRECISION."""
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    for case in cases:
        own = folder / f"{case} of {world.size}"
        own.mkdir(exist_ok=True)
        weights, seen = train(case, world, device, own)
        plain, _ = train(case, world, device, None)
        seen["traceless"] = all(torch.equal(weights[name], plain[name]) for name in plain)
        report(case=case, rank=world.rank, **seen)


if __name__ == "__main__":
    run_scan(main)
