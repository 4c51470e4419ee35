"""Memory of DeepSpeed's states; run by test_memory.py, reports one line a case and rank.

Between a backward pass and its step, the bytes of the storages of all live tensors are added up. Tensors are found
with the garbage collector and not with DeepSpeed's attributes, so that none is missed. Buckets are those that the
optimiser refers to; they are counted separately. Objects from before the first case are frozen, so that the
collector skips them.
"""

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from everest_ds import distributed
from everest_ds.config import (
    BatchConfig,
    Config,
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneModelConfig,
    PretrainConfig,
    PretrainDataConfig,
    PretrainModelConfig,
)
from everest_ds.planning.memory import estimate_memory
from everest_ds.recipes import get_recipe
from everest_ds.train import engine as engines
from everest_ds.train.step.updater import make_updater
from everest_ds.train.tasks import make_task
from tests.integration.scanning import report, run_scan

# ViT-S with its decoder on small clips: 24 M parameters and negligible activations.
ACCUMULATION = 2
CONFIG = replace(
    get_recipe("k400_vit_s"),
    data=PretrainDataConfig(image_size=64, num_frames=4),
    model=PretrainModelConfig(size="small"),
)
SMALL_CLIPS = {"image_size": 64, "num_frames": 4}
FINETUNE = replace(get_recipe("k400_vit_s_ft"), data=FinetuneDataConfig(num_classes=400, **SMALL_CLIPS))
# What a case trains besides PRECISION: the autoencoder, a classifier with layer decay, or its head alone.
CONFIGS = {
    "pretrain": CONFIG,
    "finetune": FINETUNE,
    "probe": replace(FINETUNE, model=FinetuneModelConfig(size="small", drop_path=0.0, freeze_encoder=True)),
}
BUCKET = 5_000_000
NUM_LOOKS, LOOK_EVERY_S = 4, 0.1
BUSY_S = 30.0  # at most this long to wait for other threads


def storages() -> dict[int, int]:
    """Address and bytes of every storage of a live tensor or of its gradient."""
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


@contextlib.contextmanager
def watch_step(engine: Any, look: Callable[[], None]) -> Iterator[None]:
    """Measure while gradients are reduced after backward, and around the update itself."""
    import deepspeed.comm.comm as comm

    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    all_reduce, update = comm.cdb.all_reduce, optimizer.step

    def watched_all_reduce(*args: Any, **kwargs: Any) -> Any:
        tensor = args[0] if args else kwargs["tensor"]
        if not hasattr(engine.optimizer, "ipg_buckets") and tensor.numel() > BUCKET:
            look()
        return all_reduce(*args, **kwargs)

    def watched_update(*args: Any, **kwargs: Any) -> Any:
        look()
        done = update(*args, **kwargs)
        look()
        return done

    with (
        mock.patch.object(comm.cdb, "all_reduce", watched_all_reduce),
        mock.patch.object(optimizer, "step", watched_update),
    ):
        yield


def others_are_running() -> bool:
    """Whether another thread of this process runs or is ready to run."""
    own, states = threading.get_native_id(), []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            if task.name != str(own):
                states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return "R" in states


def others(config: Config) -> tuple[torch.Tensor, ...]:
    """The inputs of a task besides one clip: noise, or a label and noise."""
    if isinstance(config, FinetuneConfig):
        values = 2 * 12 if config.model.drop_path else 0
        return torch.zeros(1, dtype=torch.int64), torch.rand(1, values)
    assert isinstance(config, PretrainConfig)
    return (torch.rand(1, config.num_selected),)


def run_case(config: Config, ds_config: dict[str, Any], device: torch.device) -> dict[str, int]:
    """Take one step and a second one up to its update; return the memory in use on the way."""
    before = set(storages())
    torch.manual_seed(0)
    engine = engines.build_engine(make_task(config), config, ds_config, device)
    updater = make_updater(engine, config.optim, ds_config)
    engine.train()
    edge = config.data.image_size
    clips = torch.randint(0, 256, (1, 3, config.data.num_frames, edge, edge), dtype=torch.uint8)
    inputs = (clips, *others(config))
    before |= {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def held() -> int:
        apart = before | buckets(engine.optimizer)
        return sum(count for address, count in storages().items() if address not in apart)

    seen: dict[str, int] = {"states": 0, "forward": 0, "step": 0}

    def note(moment: str) -> None:
        seen[moment] = max(seen[moment], held())

    def note_states() -> None:
        """Measure several times: the thread of a finished reduction keeps its bucket until it runs again."""
        distributed.barrier()
        looks, until = [], time.monotonic() + BUSY_S
        while len(looks) < NUM_LOOKS:
            time.sleep(LOOK_EVERY_S)
            if not others_are_running() or time.monotonic() > until:
                looks.append(held())
        seen["states"] = max(seen["states"], min(looks))

    def micro_step(is_watched: bool) -> None:
        hook = engine.module.register_forward_hook(lambda *_: note("forward")) if is_watched else None
        updater.forward_backward(inputs)
        if hook is not None:
            hook.remove()
            note_states()
        updater.step()

    for _ in range(engine.gradient_accumulation_steps()):  # the first step creates the optimiser's states
        micro_step(is_watched=False)
    with watch_step(engine, lambda: note("step")):
        for _ in range(engine.gradient_accumulation_steps()):
            micro_step(is_watched=True)
    engine.destroy()
    return seen


def main(world: distributed.World, device: torch.device) -> None:
    """Run each case: FILE:PRECISION, then overrides of CONFIG, GRADIENTS and micro-batches a step."""
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    gc.collect()
    gc.freeze()
    for case in cases:
        name, precision, *others = case.split(":")
        accumulation = next((int(word) for word in others if word.isdigit()), ACCUMULATION)
        batch = BatchConfig(global_size=world.size * accumulation, micro_size=1)
        config = replace(next((CONFIGS[word] for word in others if word in CONFIGS), CONFIG), batch=batch)
        if "deepspeed" in others:
            config = replace(config, optim=replace(config.optim, gradients="deepspeed"))
        systems = engines.load_systems(folder / f"{name}.json")
        if "reduce_bucket_size" in systems["zero_optimization"]:
            systems["zero_optimization"]["reduce_bucket_size"] = BUCKET
        ds_config = engines.resolve_ds_config(
            systems, config, world_size=world.size, precision=precision, device_type="cpu"
        )
        measured = run_case(config, ds_config, device)
        gc.collect()
        estimate = estimate_memory(config, ds_config, world_size=world.size)
        states = estimate.states + estimate.host + estimate.part
        expected = {"states": states, "step": states - estimate.part + estimate.step, "gathered": estimate.gathered}
        report(case=case, rank=world.rank, measured=measured, estimate=expected)


if __name__ == "__main__":
    run_scan(main)
