"""Speed and memory of steps of the real task in the real DeepSpeed engine, on synthetic clips on the device.

All micro-batches of a measurement share one engine, which does not depend on the number of clips. Each micro-batch
begins with an empty cache and a reset peak.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everest_ds import distributed
from everest_ds.benchmark.report import gpu_memory_gib, rounded
from everest_ds.benchmark.steps.profiling import OPTIMISER_REGION, profile_step
from everest_ds.benchmark.steps.timing import Marks, step_times
from everest_ds.config import BatchConfig, Config, FinetuneConfig, PretrainConfig
from everest_ds.data.clips.dataset import ClipBatch
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.model.attention import choose_backend
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.sizes import get_size
from everest_ds.planning.sharding import num_classes
from everest_ds.train import engine as engines
from everest_ds.train.precision import PrecisionName, choose_precision, precision_of
from everest_ds.train.record.metrics import peak_memory_gib, peak_tflops
from everest_ds.train.selecting import num_pretrain_noise
from everest_ds.train.step.gradients import choose_gradients
from everest_ds.train.step.graph import why_eager
from everest_ds.train.step.updater import Updater, make_updater
from everest_ds.train.tasks import Task, make_task

# Movement of the square of `moving_clips` from one frame to the next, in pixels.
PIXELS_A_FRAME = 3


def moving_clips(count: int, num_frames: int, image_size: int, generator: torch.Generator) -> Tensor:
    """Return clips of a textured square that moves over a still, textured background.

    Some tokens change and others do not, as in real video, so selection and its budgets do realistic work. Returns
    clips_BCTHW, uint8, on the generator's device.
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


def synthetic_batch(task: Task, count: int, device: torch.device, seed: int) -> ClipBatch:
    """Return a micro-batch of ``count`` clips on the device, as from a loader; the seed determines it."""
    config, index_B, target_BK = task.config, torch.arange(count, device=device), None
    generator = torch.Generator(device).manual_seed(seed)
    if isinstance(config, PretrainConfig):
        frames, noise_length, label_B = config.candidate_frames, num_pretrain_noise(config), index_B * 0
    else:
        assert isinstance(config, FinetuneConfig)
        assert isinstance(task.model, EverestClassifier)
        assert config.data.num_classes is not None
        frames, noise_length = config.data.num_frames, task.model.num_noise(config.grid)
        label_B = index_B % config.data.num_classes
        target_BK = F.one_hot(label_B, config.data.num_classes).float() if config.data.mixes else None
    return ClipBatch(
        clips_BCTHW=moving_clips(count, frames, config.data.image_size, generator),
        frames_BT=torch.arange(frames, device=device).expand(count, -1),
        noise_BS=torch.rand(count, noise_length, device=device, generator=generator),
        label_B=label_B,
        index_B=index_B,
        target_BK=target_BK,
    )


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """A task in its engine with the updater that takes its steps.

    ``settings`` are fields of every line of a measurement.
    """

    task: Task
    engine: Any
    updater: Updater
    settings: dict[str, Any]
    world: World
    device: torch.device


def build_workbench(
    config: Config, ds_config_file: Path | None, precision: PrecisionName, world: World, *, micro_size: int
) -> Workbench:
    """Join the process group and build task and engine, with weights drawn from the run's seed.

    The recipe's batch size is ignored: a step is one micro-batch of each process and an update.
    """
    config = with_classes(config)
    config = replace(config, batch=BatchConfig(global_size=micro_size * world.size, micro_size=micro_size))
    systems = engines.load_systems(ds_config_file)
    engines.check_sections(systems, str(ds_config_file))
    device_type = "cuda" if distributed.select_accelerator() else "cpu"
    size, dtype = get_size(config.model.size), choose_precision(systems, precision, device_type).matmul_dtype
    backend = choose_backend(config.model.attention, torch.device(device_type), dtype, size.width // size.num_heads)
    engines.check_compilation(config, systems, device_type)
    eager = why_eager(config, systems, device_type)
    device = distributed.start(world)
    ds_config = engines.resolve_ds_config(
        systems, config, world_size=world.size, precision=precision, device_type=device.type
    )
    torch.manual_seed(config.run.seed)
    task = make_task(config)
    engine = engines.build_engine(task, config, ds_config, device)
    engine.train()
    engines.set_learning_rate(engine, config.optim.base_lr)
    gradients = choose_gradients(config.optim.gradients, ds_config)
    names = ("activation_checkpointing", "recompute_attention", "compile_blocks")
    settings = {
        "ds_config": None if ds_config_file is None else str(ds_config_file),
        "zero_stage": engines.zero_stage(ds_config),
        "precision": precision_of(ds_config).name,
        "attention": backend.name,
        "gradients": gradients,
        "cuda_graph": eager is None,
        **{name: getattr(config.model, name) for name in names},
    }
    updater = make_updater(engine, config.optim, ds_config, captures=eager is None)
    return Workbench(task=task, engine=engine, updater=updater, settings=settings, world=world, device=device)


def with_classes(config: Config) -> Config:
    """Return the configuration with a number of classes, an assumed one if it comes from lists."""
    if isinstance(config, FinetuneConfig):
        return replace(config, data=replace(config.data, num_classes=num_classes(config)))
    return config


def take_step(bench: Workbench, inputs: tuple[Tensor, ...]) -> Tensor:
    """Take an optimiser step on one micro-batch and return its loss as a tensor on the device."""
    loss = bench.updater.forward_backward(inputs)
    with torch.profiler.record_function(OPTIMISER_REGION):
        bench.updater.step()
    return loss


def measure_steps(
    bench: Workbench,
    micro_size: int,
    *,
    steps: int,
    warmup: int,
    ceiling_tflops: float | None,
    num_kernels: int = 0,
) -> dict[str, Any]:
    """Measure steps of one micro-batch and return the fields of its line. All ranks must call it.

    The time of a step is that of the slowest process. MFU counts the forward and backward operations of the kept
    tokens and the ranking of all tokens, but no recomputation. ``ceiling_tflops`` is None on a CPU. Calls, launches
    and the longest kernels are those of this process.
    """
    device, task = bench.device, bench.task
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seed = task.config.run.seed + bench.world.rank
    inputs = task.inputs(synthetic_batch(task, micro_size, device, seed), device)
    for _ in range(warmup):
        take_step(bench, inputs)
    graph = bench.updater.graph
    marks, tokens = Marks(device), 0
    marks.mark()
    for _ in range(steps):
        take_step(bench, inputs)
        tokens += task.visible_tokens
        marks.mark()
    reserved = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else None
    everyone = distributed.gather_objects((marks.seconds(), tokens, peak_memory_gib(device), reserved))
    profiled = profile_step(device, partial(take_step, bench, inputs), num_kernels=num_kernels)
    times_of, tokens_of, peaks, reserved_of = zip(*everyone, strict=True)
    slowest = [max(times) for times in zip(*times_of, strict=True)]
    clips_per_s = micro_size * bench.world.size * steps / sum(slowest)
    used_tflops = clips_per_s / bench.world.size * task.clip_flops() / 1e12
    sheet_tflops = peak_tflops(device)
    return {
        "cuda_graph": graph is not None and graph.obstacle is None,
        "cuda_graph_obstacle": None if graph is None else graph.obstacle,
        "clips_per_s": round(clips_per_s, 4),
        "tokens_per_s": round(sum(tokens_of) / sum(slowest), 1),
        **step_times(slowest),
        "peak_allocated_gib": round(max(peaks), 4),
        "peak_reserved_gib": None if reserved is None else round(max(reserved_of), 4),
        "tflops": round(used_tflops, 4),
        "ceiling_tflops": rounded(ceiling_tflops, 1),
        "mfu": rounded(ceiling_tflops and used_tflops / ceiling_tflops),
        "data_sheet_tflops": sheet_tflops,
        "mfu_data_sheet": rounded(sheet_tflops and used_tflops / sheet_tflops),
        **profiled.fields(),
    }


def limit_memory(memory_gib: float | None, world: World) -> None:
    """Limit the memory that this process may allocate on its GPU; refuse more than the GPU has."""
    if memory_gib is None:
        return
    whole = gpu_memory_gib(world.local_rank)
    if memory_gib > whole:
        raise UserError(f"--memory-gib {memory_gib:g} is more than the {whole:.2f} GiB of this GPU; give less")
    torch.cuda.set_per_process_memory_fraction(memory_gib / whole, world.local_rank)
