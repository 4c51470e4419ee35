"""What DeepSpeed holds: run by two processes of test_memory.py, one line of JSON a case and rank.

After a backward pass, before the step, all live tensors of the process are collected and the bytes of their
storages added up, each once: by the garbage collector and not by DeepSpeed's attributes, so that nothing is
overlooked. Buckets are known by what the optimiser points to and are counted apart.
"""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.config import BatchConfig, Config, DataConfig, ModelConfig
from everest_ds.recipes import get_recipe
from everest_ds.train import engine as engines
from everest_ds.train.memory import estimate_memory
from everest_ds.train.tasks import PretrainTask

# ViT-S with its decoder over small clips: 24 M parameters, and activations that do not count.
ACCUMULATION = 2
CONFIG = replace(
    get_recipe("k400_vit_s"),
    data=DataConfig(image_size=64, num_frames=4),
    model=ModelConfig(size="small"),
    batch=BatchConfig(global_size=2 * ACCUMULATION, micro_size=1),
)
BUCKET = 5_000_000


def storages() -> dict[int, int]:
    """Address and bytes of every storage that a live tensor, or the gradient of one, points to."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor) or item.is_meta:
            continue
        gradient = item.grad if item.is_leaf else None
        for tensor in (item,) if gradient is None else (item, gradient):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def buckets(optimizer: Any) -> set[int]:
    """Addresses of the buffers that gradients are communicated in."""
    found = set()
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        found |= {buffer.untyped_storage().data_ptr() for buffer in buffers if buffer is not None}
    return found


def run_case(config: Config, ds_config: dict[str, Any], device: torch.device) -> dict[str, int]:
    """Take a step, go through a second one up to its update, and return what was held on the way."""
    before = set(storages())
    torch.manual_seed(0)
    engine = engines.build_engine(PretrainTask(config), config, ds_config, device)
    engine.train()
    edge = config.data.image_size
    clips = torch.randint(0, 256, (1, 3, config.data.num_frames, edge, edge), dtype=torch.uint8)
    noise = torch.rand(1, config.num_selected)
    before |= {clips.untyped_storage().data_ptr(), noise.untyped_storage().data_ptr()}

    def held() -> tuple[int, int]:
        now = {address: count for address, count in storages().items() if address not in before}
        in_buckets = buckets(engine.optimizer)
        communication = sum(count for address, count in now.items() if address in in_buckets)
        return sum(now.values()) - communication, communication

    seen: dict[str, int] = {"states": 0, "communication": 0, "forward": 0}
    for second in (False, True):
        for _ in range(ACCUMULATION):
            loss = engine(clips, noise)
            if second:
                seen["forward"] = max(seen["forward"], held()[0])
            engine.backward(loss)
            del loss
            if second:
                states, communication = held()
                seen["states"] = max(seen["states"], states)
                seen["communication"] = max(seen["communication"], communication)
            engines.step(engine)
    engine.destroy()
    return seen


def main(folder: Path, cases: list[str]) -> None:
    """Run each case, FILE:PRECISION."""
    world = distributed.World.from_environment()
    device = distributed.start(world)
    for case in cases:
        name, precision = case.split(":")
        systems = engines.load_systems(folder / f"{name}.json")
        if "reduce_bucket_size" in systems["zero_optimization"]:
            systems["zero_optimization"]["reduce_bucket_size"] = BUCKET
        ds_config = engines.resolve_ds_config(
            systems, CONFIG, world_size=world.size, precision=precision, device_type="cpu"
        )
        measured = run_case(CONFIG, ds_config, device)
        gc.collect()
        estimate = estimate_memory(CONFIG, ds_config, world_size=world.size)
        expected = {"states": estimate.states + estimate.host, "gathered": estimate.gathered}
        line = {"case": case, "rank": world.rank, "measured": measured, "estimate": expected}
        sys.stdout.write(f"SEEN {json.dumps(line)}\n")  # in one piece: two processes write
        sys.stdout.flush()
    distributed.finish()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
