"""Preparation of a run: checks first, then model, engine and weights. Writes no files."""

from dataclasses import dataclass
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.config import Config, FinetuneConfig, GradientsName, PretrainConfig
from everest_ds.data.clips.augment import check_rand_augment
from everest_ds.data.lists.contents import sample_contents
from everest_ds.data.lists.run_lists import Lists
from everest_ds.data.lists.video_list import fingerprint
from everest_ds.distributed import World
from everest_ds.model.attention import choose_backend
from everest_ds.model.sizes import get_size
from everest_ds.train.checkpoints.save import TrainState
from everest_ds.train.checkpoints.start import Start, choose_start
from everest_ds.train.ema import WeightAverage
from everest_ds.train.engine import (
    build_engine,
    check_compilation,
    check_sections,
    load_systems,
    resolve_ds_config,
    zero_stage,
)
from everest_ds.train.job import TrainingJob
from everest_ds.train.precision import Precision, choose_precision
from everest_ds.train.record.start_times import StartTimes
from everest_ds.train.schedule import Schedule
from everest_ds.train.step.gradients import choose_gradients
from everest_ds.train.step.graph import why_eager
from everest_ds.train.step.optim import describe_groups
from everest_ds.train.tasks import Task, make_task


@dataclass(frozen=True, kw_only=True)
class ReadyRun:
    """A run that has passed all checks. No files are written yet.

    Attributes:
        lists: The lists of the run, with its configuration.
        ds_config: The resolved DeepSpeed configuration.
        start: Where the run starts: fresh, from weights, or from a checkpoint.
        schedule: The steps of the run.
        task: The task, with the weights that the run starts from.
        engine: The DeepSpeed engine around the task.
        average: The moving average of the weights, if there is one.
        groups: The optimiser's groups, for the record.
        attention: The attention backend.
        gradients: How gradients are stored, flat or deepspeed.
        eager: Why steps are not captured as a CUDA graph; None if they are.
        world: The ranks.
        device: This rank's device.
    """

    lists: Lists
    ds_config: dict[str, Any]
    start: Start
    schedule: Schedule
    task: Task
    engine: Any
    average: WeightAverage | None
    groups: list[dict[str, float]]
    attention: str
    gradients: GradientsName
    eager: str | None
    world: World
    device: torch.device

    @property
    def config(self) -> Config:
        """The configuration, with the number of classes."""
        return self.lists.config


def check_alone(job: TrainingJob) -> tuple[str, Precision]:
    """Do all checks that need no other process; return attention backend and precision."""
    config = job.lists.config
    if isinstance(config, FinetuneConfig) and config.data.rand_augment is not None:
        check_rand_augment(config.data.rand_augment)
    systems = load_systems(job.options.ds_config)
    check_sections(systems, str(job.options.ds_config))
    Schedule.of(config, len(job.lists.train))
    device_type = "cuda" if distributed.select_accelerator() else "cpu"
    precision = choose_precision(systems, job.options.precision, device_type)
    check_compilation(config, systems, device_type)
    choose_gradients(config.optim.gradients, systems)
    why_eager(config, systems, device_type)
    size = get_size(config.model.size)
    heads = [size.width // size.num_heads]
    if isinstance(config, PretrainConfig):
        heads.append(size.decoder_width // size.decoder_num_heads)
    dtype = precision.matmul_dtype
    backends = [choose_backend(config.model.attention, torch.device(device_type), dtype, head) for head in heads]
    return backends[0].name, precision


def make_ready(
    job: TrainingJob, world: World, device: torch.device, attention: str, precision: Precision, times: StartTimes
) -> ReadyRun:
    """Build model and engine and load the state that the run starts from. All ranks must call it."""
    options, config = job.options, job.lists.config
    systems = load_systems(options.ds_config)
    ds_config = resolve_ds_config(
        systems, config, world_size=world.size, precision=options.precision, device_type=device.type
    )
    train, val = job.lists.train, job.lists.val
    # Rank 0 samples for all ranks, so that they agree on which videos have changed.
    contents = [sample_contents(rows) if world.is_main and rows is not None else None for rows in (train, val)]
    contents = distributed.gather_objects(contents)[0]
    now = TrainState(
        world_size=world.size,
        zero_stage=zero_stage(ds_config),
        dtype=precision.weights,
        autocast=precision.autocasts,
        videos=fingerprint(train),
        contents=contents[0],
        val_videos=None if val is None else fingerprint(val),
        val_contents=contents[1],
    )
    start = choose_start(job.resume, now, world, options.init_from, options.init_allow)
    times.end("verifying")
    torch.manual_seed(config.run.seed)
    task = make_task(config)
    task.threshold = start.state.threshold
    groups = describe_groups(task.parameter_groups())
    with start.ready(task, world) as load:
        engine = build_engine(task, config, ds_config, device, universal=start.reshards)
        times.end("engine")
        load(engine)
    average = None
    if isinstance(config, FinetuneConfig) and config.optim.ema_decay is not None:
        average = WeightAverage(engine, config.optim.ema_decay)
        if start.checkpoint is not None:
            average.load(start.checkpoint)
    times.end("weights and optimiser")
    return ReadyRun(
        lists=job.lists,
        ds_config=ds_config,
        start=start,
        schedule=Schedule.of(config, len(job.lists.train), start_step=start.state.step),
        task=task,
        engine=engine,
        average=average,
        groups=groups,
        attention=attention,
        gradients=choose_gradients(config.optim.gradients, ds_config),
        eager=why_eager(config, ds_config, device.type),
        world=world,
        device=device,
    )
