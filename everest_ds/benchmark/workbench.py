"""Steps of the real task in the real DeepSpeed engine, on clips that lie on the device: how fast, how large.

Place in the flow: `benchmark.step` builds one `Workbench` and measures micro-batches on it, one by one.
All sizes go through one engine: how many clips a batch has, only the input knows. A process of its own for each
would cost a start of DeepSpeed and a measured ceiling every time, and give nothing: each size begins with an empty
cache and a new peak, and after the first that does not fit, the engine is in no state to go on and the sweep ends.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everest_ds import distributed
from everest_ds.benchmark.profile import OPTIMISER_REGION, profile_activities, time_shares
from everest_ds.benchmark.timing import Marks, milliseconds
from everest_ds.config import BatchConfig, Config, FinetuneConfig, PretrainConfig
from everest_ds.data.clips.dataset import ClipBatch
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.model.attention import choose_backend
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.sizes import get_size
from everest_ds.planning.sharding import num_classes
from everest_ds.train import engine as engines
from everest_ds.train.optim_step import Updater
from everest_ds.train.precision import PrecisionName, choose_precision, precision_of
from everest_ds.train.record.metrics import peak_memory_gib, peak_tflops
from everest_ds.train.selecting import num_pretrain_noise
from everest_ds.train.tasks import Task, make_task

# Pixels that what moves goes on from one frame to the next.
PIXELS_A_FRAME = 3


def moving_clips(count: int, num_frames: int, image_size: int, generator: torch.Generator) -> Tensor:
    """Return clips in which a textured square drifts over a textured ground that stands still.

    So some tokens change and others do not, as in video: selection by change and its budgets have work to do.

    Args:
        count: B.
        num_frames: T.
        image_size: H and W in pixels.
        generator: Of the device that the clips are made on.

    Returns:
        clips_BCTHW, uint8.
    """

    def texture(edge: int) -> Tensor:
        shape, device = (count, 3, edge, edge), generator.device
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)

    edge = max(image_size // 2, 1)
    clips_BCTHW = texture(image_size)[:, :, None].repeat(1, 1, num_frames, 1, 1)
    square_BCHW = texture(edge)
    for frame in range(num_frames):
        start = frame * PIXELS_A_FRAME % (image_size - edge + 1)
        clips_BCTHW[:, :, frame, start : start + edge, start : start + edge] = square_BCHW
    return clips_BCTHW


def synthetic_batch(task: Task, config: Config, count: int, device: torch.device, seed: int) -> ClipBatch:
    """Return a micro-batch as a loader would hand it over, on the device; the same for the same seed.

    Args:
        task: What the batch is for.
        config: The run.
        count: Clips.
        device: Where it is made.
        seed: Of pixels and noise.
    """
    generator = torch.Generator(device).manual_seed(seed)
    frames = config.candidate_frames if isinstance(config, PretrainConfig) else config.data.num_frames
    clips_BCTHW = moving_clips(count, frames, config.data.image_size, generator)
    noise_BS = torch.rand(count, _noise_length(task, config), device=device, generator=generator)
    label_B, target_BK = torch.zeros(count, dtype=torch.int64, device=device), None
    if isinstance(config, FinetuneConfig):
        assert config.data.num_classes is not None
        label_B = torch.arange(count, device=device) % config.data.num_classes
        target_BK = F.one_hot(label_B, config.data.num_classes).float() if config.data.mixes else None
    return ClipBatch(
        clips_BCTHW=clips_BCTHW,
        frames_BT=torch.arange(frames, device=device).expand(count, -1),
        noise_BS=noise_BS,
        label_B=label_B,
        index_B=torch.arange(count, device=device),
        target_BK=target_BK,
    )


def _noise_length(task: Task, config: Config) -> int:
    if isinstance(config, PretrainConfig):
        return num_pretrain_noise(config)
    assert isinstance(task.model, EverestClassifier)
    return task.model.num_noise(config.grid)


PROFILED_STEPS = 2
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """What steps are measured on.

    Attributes:
        config: The run, its classes resolved.
        task: What turns a batch into a loss.
        engine: DeepSpeed's, around the task.
        updater: Takes its optimiser steps.
        ds_config: As the engine was given it.
        world: This process's place.
        device: Its device.
        attention: The backend that attends.
    """

    config: Config
    task: Task
    engine: Any
    updater: Updater
    ds_config: dict[str, Any]
    world: World
    device: torch.device
    attention: str

    @property
    def precision(self) -> str:
        """What the model computes in: bf16, autocast or fp32."""
        return precision_of(self.ds_config).name

    def describe(self) -> dict[str, Any]:
        """Return what all lines of a sweep have in common, besides the machine."""
        return {
            "zero_stage": engines.zero_stage(self.ds_config),
            "precision": self.precision,
            "attention": self.attention,
            "activation_checkpointing": self.config.model.activation_checkpointing,
            "recompute_attention": self.config.model.recompute_attention,
            "compile_blocks": self.config.model.compile_blocks,
        }


def build_workbench(
    config: Config, ds_config_file: Path | None, precision: PrecisionName, world: World, *, micro_size: int
) -> Workbench:
    """Join the processes and build task and engine, weights drawn from the run's seed.

    The batch of the recipe does not count: each process takes one micro-batch a step, and every step updates.

    Raises:
        UserError: The DeepSpeed file or the attention backend cannot serve.
    """
    config = resolve_classes(config)
    config = replace(config, batch=BatchConfig(global_size=micro_size * world.size, micro_size=micro_size))
    systems = engines.load_systems(ds_config_file)
    engines.check_sections(systems, str(ds_config_file))
    device_type = "cuda" if distributed.select_accelerator() else "cpu"
    size = get_size(config.model.size)
    backend = choose_backend(
        config.model.attention,
        torch.device(device_type),
        choose_precision(systems, precision, device_type).products_dtype,
        size.width // size.num_heads,
    )
    engines.check_compilation(config, systems, device_type)
    device = distributed.start(world)
    ds_config = engines.resolve_ds_config(
        systems, config, world_size=world.size, precision=precision, device_type=device.type
    )
    torch.manual_seed(config.run.seed)
    task = make_task(config)
    engine = engines.build_engine(task, config, ds_config, device)
    engine.train()
    engines.set_learning_rate(engine, config.optim.base_lr)
    return Workbench(
        config=config, task=task, engine=engine, updater=Updater(engine, config.optim.max_grad_norm),
        ds_config=ds_config, world=world, device=device, attention=backend.name,
    )  # fmt: skip


def resolve_classes(config: Config) -> Config:
    """Return the run with a number of classes, an assumed one where its lists are to say it."""
    if isinstance(config, FinetuneConfig):
        return replace(config, data=replace(config.data, num_classes=num_classes(config)))
    return config


def measure_steps(
    bench: Workbench, micro_size: int, *, steps: int, warmup: int, ceiling_tflops: float | None
) -> dict[str, Any]:
    """Return what steps of one micro-batch come to, as fields of a line; all processes call it.

    A step lasts as long as that of the slowest process. MFU counts the operations that the kept tokens need,
    forward and backward, and the ranking of all tokens; nothing that is computed again.

    Args:
        bench: What is measured.
        micro_size: Clips a process.
        steps: Timed steps.
        warmup: Steps before them.
        ceiling_tflops: What the device reaches at best; None on a CPU.

    Raises:
        torch.OutOfMemoryError: The micro-batch does not fit.
    """
    device = bench.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    batch = synthetic_batch(bench.task, bench.config, micro_size, device, bench.config.run.seed + bench.world.rank)
    inputs = bench.task.inputs(batch, device)
    for _ in range(warmup):
        take_step(bench, inputs)
    marks, tokens = Marks(device), 0
    marks.mark()
    for _ in range(steps):
        take_step(bench, inputs)
        tokens += bench.task.visible_tokens
        marks.mark()
    own = marks.seconds(), tokens, peak_memory_gib(device), _reserved_gib(device)
    everyone = distributed.gather_objects(own)
    shares = profiled_shares(bench, partial(take_step, bench, inputs))
    slowest = [max(times) for times in zip(*(times for times, *_ in everyone), strict=True)]
    clips_per_s = micro_size * bench.world.size * steps / sum(slowest)
    reserved = [gib for *_, gib in everyone if gib is not None]
    return {
        "clips_per_s": round(clips_per_s, 4),
        "tokens_per_s": round(sum(count for _, count, *_ in everyone) / sum(slowest), 1),
        **milliseconds(slowest),
        "peak_allocated_gib": round(max(gib for _, _, gib, _ in everyone), 4),
        "peak_reserved_gib": round(max(reserved), 4) if reserved else None,
        **_utilisation(bench, clips_per_s / bench.world.size, ceiling_tflops),
        "shares": shares,
    }


def limit_memory(memory_gib: float | None, world: World) -> None:
    """Have the caching allocator of this process's GPU refuse more than so much; None limits nothing.

    Raises:
        UserError: The GPU has less.
    """
    if memory_gib is None:
        return
    whole = torch.cuda.get_device_properties(world.local_rank).total_memory / 2**30
    if memory_gib > whole:
        raise UserError(f"--memory-gib {memory_gib:g} is more than this GPU has, {whole:.2f}")
    torch.cuda.set_per_process_memory_fraction(memory_gib / whole, world.local_rank)


def powers_of_two(first: int) -> Iterator[int]:
    """Yield first, 2 first, 4 first, and so on without an end."""
    while True:
        yield first
        first *= 2


def take_step(bench: Workbench, inputs: tuple[Tensor, ...]) -> Tensor:
    """Take an optimiser step on one micro-batch and return its loss, on the device."""
    loss: Tensor = bench.engine(*inputs)
    bench.engine.backward(loss)
    with torch.profiler.record_function(OPTIMISER_REGION):
        bench.updater.step()
    return loss.detach()


def profiled_shares(bench: Workbench, step: Callable[[], object]) -> dict[str, float] | None:
    """Return the share of each part of a step in its time, over steps beside the timed ones."""
    with torch.profiler.profile(activities=profile_activities(bench.device)) as profile:
        for _ in range(PROFILED_STEPS):
            step()
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
    shares = time_shares(list(profile.events() or ()), bench.device.type)
    return None if shares is None else {part: round(share, 4) for part, share in shares.items()}


def _utilisation(bench: Workbench, clips_per_s: float, ceiling_tflops: float | None) -> dict[str, float | None]:
    """Return what one device computes a second, and its share of what it could."""
    used = clips_per_s * bench.task.clip_flops() / 1e12
    sheet = peak_tflops(bench.device)
    return {
        "tflops": round(used, 4),
        "ceiling_tflops": None if ceiling_tflops is None else round(ceiling_tflops, 1),
        "mfu": None if ceiling_tflops is None else round(used / ceiling_tflops, 4),
        "data_sheet_tflops": sheet,
        "mfu_data_sheet": None if sheet is None else round(used / sheet, 4),
    }


def _reserved_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else None
