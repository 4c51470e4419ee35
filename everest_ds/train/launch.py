"""From a job to a trained run directory: the work of `everest pretrain` and `everest finetune`.

The order matters: everything that can be refused is refused before any process joins the others, so that a wrong
setting costs seconds and ends all ranks alike.
"""

import contextlib
import time
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.data.clips.augment import check_rand_augment
from everest_ds.data.clips.dataset import make_loader
from everest_ds.data.clips.sampling import GlobalBatchSampler
from everest_ds.data.lists.run_lists import Lists
from everest_ds.data.lists.video_list import fingerprint
from everest_ds.distributed import World
from everest_ds.inference.validation import Validation
from everest_ds.model.attention import choose_backend
from everest_ds.model.sizes import get_size
from everest_ds.train.checkpoints.run_dir import require_shared
from everest_ds.train.checkpoints.save import TrainState, point_to_best, set_aside
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
from everest_ds.train.loop import Trainer
from everest_ds.train.optim import describe_groups
from everest_ds.train.precision import Precision, choose_precision
from everest_ds.train.record.run_record import close_run, compare_memory, open_run
from everest_ds.train.schedule import Schedule
from everest_ds.train.signals import EXIT_STOPPED
from everest_ds.train.tasks import make_task


def run(job: TrainingJob, world: World) -> int:
    """Run or continue a training of either task.

    Returns:
        The exit code: 0, or `EXIT_STOPPED` when a signal stopped the run before its end, all saved.

    Raises:
        UserError: Anything the user can mend: DeepSpeed file, weights, too many bad videos.
    """
    # 1. What can be refused without the other processes.
    lists, options = job.lists, job.options
    config = lists.config
    _check_augmentation(config)
    systems = load_systems(options.ds_config)
    check_sections(systems, str(options.ds_config))
    Schedule.of(config, len(lists.train))
    device_type = "cuda" if distributed.select_accelerator() else "cpu"
    precision = choose_precision(systems, options.precision, device_type)
    check_compilation(config, systems, device_type)
    backend = _attention_backend(config, device_type, precision)

    # 2. From here on all processes go together. The run directory is not touched before the checkpoint is loaded.
    device = distributed.start(world)
    ds_config = resolve_ds_config(
        systems, config, world_size=world.size, precision=options.precision, device_type=device.type
    )
    now = TrainState(
        world_size=world.size,
        zero_stage=zero_stage(ds_config),
        dtype=precision.weights,
        autocast=precision.autocasts,
        videos=fingerprint(lists.train),
    )
    began = time.perf_counter()
    start = choose_start(job.resume, now, world, options.init_from, options.init_allow)
    trainer = _build(lists, ds_config, start, world, device)

    # 3. Write down what this is, and go.
    if world.is_main:
        set_aside(start.damaged)
        open_run(trainer, lists, ds_config, start, backend, ready_s=time.perf_counter() - began)
    distributed.barrier()
    require_shared(start.run_dir)
    _find_best(trainer)
    taken = start.state.step
    if trainer.schedule.num_left > 0:
        with contextlib.closing(_batches(trainer)) as batches:
            taken = trainer.run(batches)
    compare_memory(trainer, ds_config, taken)
    close_run(trainer, taken)
    distributed.finish()
    return 0 if taken >= trainer.schedule.end_step else EXIT_STOPPED


def _build(
    lists: Lists,
    ds_config: dict[str, Any],
    start: Start,
    world: World,
    device: torch.device,
) -> Trainer:
    """Build model and engine and bring them to where the run starts."""
    config = lists.config
    torch.manual_seed(config.run.seed)
    task = make_task(config)
    groups = describe_groups(task.parameter_groups())
    with start.ready(task, world) as load:
        engine = build_engine(task, config, ds_config, device, universal=start.reshards)
        load(engine)
    average = None
    if isinstance(config, FinetuneConfig) and config.optim.ema_decay is not None:
        average = WeightAverage(engine, config.optim.ema_decay)
        if start.checkpoint is not None:
            average.load(start.checkpoint)
    return Trainer(
        engine=engine,
        task=task,
        config=config,
        schedule=Schedule.of(config, len(lists.train), start_step=start.state.step),
        world=world,
        device=device,
        run_dir=start.run_dir,
        log=None,
        start=start.state,
        rows=lists.train,
        groups=groups,
        validation=_validation(lists, world, device),
        average=average,
    )


def _validation(lists: Lists, world: World, device: torch.device) -> Validation | None:
    if lists.val is None or not isinstance(lists.config, FinetuneConfig):
        return None
    return Validation(rows=lists.val, config=lists.config, world=world, device=device)


def _find_best(trainer: Trainer) -> None:
    """Go on without a best score when its checkpoint is gone; all ranks agree."""
    step = trainer.best_step
    found = distributed.gather_objects(point_to_best(trainer.run_dir, step) if trainer.world.is_main else False)
    if step is not None and not found[0]:
        trainer.best_step = trainer.best_score = None
        if trainer.world.is_main:
            print(f"warning: the best checkpoint, of step {step}, is gone; the next score counts", flush=True)


def _batches(trainer: Trainer) -> Any:
    config, world, schedule = trainer.config, trainer.world, trainer.schedule
    sampler = GlobalBatchSampler(
        num_samples=len(trainer.rows),
        repeats=config.clips_per_video,
        global_size=config.batch.global_size,
        micro_size=config.batch.micro_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.run.seed,
        start_step=schedule.start_step,
        end_step=schedule.end_step,
    )
    dataset = trainer.task.make_dataset(trainer.rows)
    pin_memory = trainer.device.type == "cuda"
    return iter(make_loader(dataset, sampler, micro_size=config.batch.micro_size, pin_memory=pin_memory))


def _check_augmentation(config: Config) -> None:
    if isinstance(config, FinetuneConfig) and config.data.rand_augment is not None:
        check_rand_augment(config.data.rand_augment)


def _attention_backend(config: Config, device_type: str, precision: Precision) -> str:
    """Return the attention backend that will run; refuses one that cannot serve encoder and decoder."""
    size = get_size(config.model.size)
    heads = [size.width // size.num_heads]
    if isinstance(config, PretrainConfig):
        heads.append(size.decoder_width // size.decoder_num_heads)
    device, dtype = torch.device(device_type), precision.products_dtype
    names = [choose_backend(config.model.attention, device, dtype, head).name for head in heads]
    return names[0]
