"""From a job to a trained run directory: the work of `everest pretrain` and `everest finetune`.

The order matters. Everything that can be refused is refused first, as far as possible before any process joins the
others: a wrong setting costs seconds, ends all ranks alike, and leaves nothing behind.
"""

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.config import Config, FinetuneConfig, GradientsName, PretrainConfig
from everest_ds.console import streams
from everest_ds.console.messages import say
from everest_ds.data.clips.augment import check_rand_augment
from everest_ds.data.clips.dataset import make_loader
from everest_ds.data.clips.sampling import GlobalBatchSampler
from everest_ds.data.lists.contents import sample_contents
from everest_ds.data.lists.run_lists import Lists
from everest_ds.data.lists.video_list import fingerprint
from everest_ds.data.loading.pool import start_fork_server
from everest_ds.data.readers.choice import choose_reader
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import write_atomically
from everest_ds.inference.validation import Validation
from everest_ds.model.attention import choose_backend
from everest_ds.model.sizes import get_size
from everest_ds.planning.memory import GIB, MemoryEstimate, describe_estimate, estimate_memory
from everest_ds.train.callbacks import Callback
from everest_ds.train.checkpoints.listing import describe_strangers, unfinished_saves
from everest_ds.train.checkpoints.owner import Holding, owning
from everest_ds.train.checkpoints.run_dir import (
    Resume,
    find_pointer_fault,
    find_resume,
    require_shared,
    write_run_files,
)
from everest_ds.train.checkpoints.save import TrainState, point_to_best, point_to_latest, set_aside
from everest_ds.train.checkpoints.saving.writer import Writer, writing
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
from everest_ds.train.precision import Precision, choose_precision
from everest_ds.train.record.bad_samples import BadSamples
from everest_ds.train.record.capture import CaptureLog
from everest_ds.train.record.frames import FrameLog, chooses_frames
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.record.ownership import Ownership
from everest_ds.train.record.pictures import Pictures
from everest_ds.train.record.profile import RunProfile
from everest_ds.train.record.progress import MemoryComparison, StallHint
from everest_ds.train.record.skipped_steps import SkippedSteps
from everest_ds.train.record.start_times import FirstStep, StartTimes
from everest_ds.train.record.summary import describe_nothing_left, describe_run
from everest_ds.train.record.view import make_view
from everest_ds.train.schedule import Schedule
from everest_ds.train.signals import EXIT_STOPPED
from everest_ds.train.step.gradients import choose_gradients
from everest_ds.train.step.graph import why_eager
from everest_ds.train.step.optim import describe_groups
from everest_ds.train.step.updater import Updater, make_updater
from everest_ds.train.tasks import Task, make_task
from everest_ds.train.trackers.group import Trackers
from everest_ds.train.trackers.opening import show_run
from everest_ds.train.watch.slow_ranks import SlowRanks
from everest_ds.train.watch.watchdog import Watchdog
from everest_ds.train.watch.weights import SameWeights


@dataclass(frozen=True, kw_only=True)
class ReadyRun:
    """A run whose start nothing refuses any more. Nothing is written yet.

    Attributes:
        lists: Its lists, with the configuration.
        ds_config: The resolved DeepSpeed configuration.
        start: Where it starts.
        schedule: Its steps.
        task: The task, with the weights that the run starts from.
        engine: The DeepSpeed engine around it.
        average: The moving average of the weights, where one is kept.
        groups: The optimiser's groups, for the record.
        attention: The attention backend.
        gradients: How gradients are kept, flat or deepspeed.
        eager: Why steps are not captured as a CUDA graph; None where they are.
        world: This rank and how many there are.
        device: This rank's.
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
        """The run, its classes counted."""
        return self.lists.config


def run(job: TrainingJob, world: World) -> int:
    """Run or resume a training of either task.

    Returns:
        The exit code: 0, or `EXIT_STOPPED` when a signal stopped the run before its end, all saved.

    Raises:
        UserError: Anything the user can mend: DeepSpeed file, weights, too many bad videos.
    """
    times = StartTimes()
    attention, precision = _check_alone(job)
    times.end("imports and lists")
    if job.lists.config.data.num_workers:
        start_fork_server()
    with writing(behind=job.lists.config.run.save_async) as writer:
        device = distributed.start(world)  # from here on all processes go together
        with owning(job.resume.run_dir, world) as holding:
            job = replace(job, resume=look_again(job, world))
            times.end("meeting the other ranks")
            taken, end_step = _train(job, world, device, attention, precision, holding, writer, times)
    distributed.finish()
    return 0 if taken >= end_step else EXIT_STOPPED


def look_again(job: TrainingJob, world: World) -> Resume:
    """Return where the run resumes, now that nobody else writes to it; as rank zero sees it, on all ranks.

    The launch that owned it before may have saved since the command line was read.
    """
    resume, fault = None, None
    if world.is_main:
        try:
            resume = find_resume(job.options.out, job.lists.config, job.options.resume)
        except UserError as error:
            fault = str(error)
    if fault := distributed.agree(fault):
        raise UserError(fault)
    (found,) = (one for one in distributed.gather_objects(resume) if one is not None)
    return found


def _train(
    job: TrainingJob,
    world: World,
    device: torch.device,
    attention: str,
    precision: Precision,
    holding: Holding,
    writer: Writer | None,
    times: StartTimes,
) -> tuple[int, int]:
    """Train in a directory that this launch owns; return the steps taken, and those there are."""
    began = time.perf_counter()
    ready = _make_ready(job, world, device, attention, precision, times)
    start, schedule = ready.start, ready.schedule
    estimate = estimate_memory(ready.config, ready.ds_config, world_size=world.size, device_type=device.type)
    trackers = Trackers(ready.config.run.log_to)
    record = MetricsLog(start.run_dir, schedule.start_step, is_main=world.is_main, trackers=trackers)
    view = make_view(schedule, ready.config.run.log_every_steps)
    with contextlib.closing(record) as log, contextlib.closing(view):
        _open_record(ready, log, trackers, estimate, ready_s=time.perf_counter() - began)
        state = _with_best(start, world)
        updater = make_updater(ready.engine, ready.config.optim, ready.ds_config, captures=ready.eager is None)
        watchdog = _make_watchdog(ready)
        concerns = [*([view] if world.is_main else []), *make_callbacks(ready, updater, state, log, estimate)]
        trainer = Trainer(
            engine=ready.engine,
            updater=updater,
            task=ready.task,
            config=ready.config,
            schedule=schedule,
            world=world,
            device=device,
            run_dir=start.run_dir,
            log=log,
            start=state,
            callbacks=[Ownership(holding), watchdog, *concerns, FirstStep(log, times)],
            writer=writer,
            owner=holding.owner,
        )
        times.end("record")
        if schedule.num_left > 0:
            with watchdog.watching(), contextlib.closing(_batches(ready)) as batches:
                taken = trainer.run(batches)
        else:
            taken = trainer.run(iter(()))
            log.say(describe_nothing_left(start.run_dir, schedule, ready.config.run.max_steps))
        if taken >= schedule.end_step:
            trackers.finish()
            log.say(
                describe_run(start.run_dir, ready.config, time.perf_counter() - began)
            ) if world.is_main else None
    return taken, schedule.end_step


def _check_alone(job: TrainingJob) -> tuple[str, Precision]:
    """Refuse what can be refused without the other processes; return attention backend and precision."""
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


def _make_ready(
    job: TrainingJob, world: World, device: torch.device, attention: str, precision: Precision, times: StartTimes
) -> ReadyRun:
    """Build model and engine and bring them to where the run starts; all ranks take part."""
    options, config = job.options, job.lists.config
    systems = load_systems(options.ds_config)
    ds_config = resolve_ds_config(
        systems, config, world_size=world.size, precision=options.precision, device_type=device.type
    )
    train, val = job.lists.train, job.lists.val
    # Rank zero looks for all: they must not differ on what changed.
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


def make_callbacks(
    ready: ReadyRun, updater: Updater, state: TrainState, log: MetricsLog, estimate: MemoryEstimate
) -> list[Callback]:
    """Return what a run does besides its steps: a new concern is one more line here."""
    lists, config, world, run_dir = ready.lists, ready.config, ready.world, ready.start.run_dir
    callbacks: list[Callback] = [
        SkippedSteps(lists.train, log, allowed=config.run.max_skipped_steps, count=state.num_skipped),
        BadSamples(
            run_dir,
            world,
            max_share=config.data.max_bad_share,
            num_rows=len(lists.train),
            global_size=config.batch.global_size,
            count=state.num_bad,
        ),
        MemoryComparison(log, ready.device, estimate.allocated / GIB),
    ]
    callbacks += _compare_ranks(ready, updater, state, log)
    if world.is_main:
        if chooses_frames(config):
            callbacks.append(FrameLog(run_dir, lists.train, ready.task))
        callbacks.append(StallHint(config))
        if config.run.profile:
            callbacks.append(RunProfile(run_dir, ready.device, log))
    if config.run.pictures_every_steps:
        callbacks.append(
            Pictures(
                run_dir,
                ready.task,
                lists.train,
                log,
                world=world,
                device=ready.device,
                start_step=ready.schedule.start_step,
                partitioned=state.zero_stage == 3,
                autocasts=state.autocast,
            )
        )
    if updater.graph is not None:
        callbacks.append(CaptureLog(log, updater.graph, world))
    if ready.average is not None:
        callbacks.append(ready.average)
    if lists.val is not None and isinstance(config, FinetuneConfig):
        callbacks.append(
            Validation(
                ready.engine,
                lists.val,
                config,
                ready.schedule,
                world=world,
                device=ready.device,
                log=log,
                average=ready.average,
                start=state,
                class_names=(lists.classes and lists.classes.names) or (),
            )
        )
    return callbacks


def _compare_ranks(ready: ReadyRun, updater: Updater, state: TrainState, log: MetricsLog) -> list[Callback]:
    world, every = ready.world, ready.config.run.check_weights_every
    if world.size == 1:
        return []
    slow = SlowRanks(log, updater.stopwatch)
    if not every:
        return [slow]
    return [slow, SameWeights(ready.engine, ready.start.run_dir, world, log, every=every, start_step=state.step)]


def _make_watchdog(ready: ReadyRun) -> Watchdog:
    data = ready.config.data
    return Watchdog(
        ready.start.run_dir,
        ready.world,
        hang_after_s=ready.config.run.hang_after_s,
        loader_s=data.timeout_s if data.num_workers else 0.0,
    )


def _with_best(start: Start, world: World) -> TrainState:
    """Return where the run stands, without a best score when its checkpoint is gone; all ranks agree."""
    step = start.state.best_step
    found = distributed.gather_objects(point_to_best(start.run_dir, step) if world.is_main else False)
    if step is None or found[0]:
        return start.state
    if world.is_main:
        say(f"warning: the best checkpoint, of step {step}, is gone; the next score counts")
    return replace(start.state, best_step=None, best_score=None)


def _batches(ready: ReadyRun) -> Any:
    config, world, rows = ready.config, ready.world, ready.lists.train
    sampler = GlobalBatchSampler(
        num_samples=len(rows),
        repeats=config.data.repeats,
        global_size=config.batch.global_size,
        micro_size=config.batch.micro_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.run.seed,
        start_step=ready.schedule.start_step,
        end_step=ready.schedule.end_step,
    )
    pin_memory = ready.device.type == "cuda"
    dataset = ready.task.make_dataset(rows)
    return iter(make_loader(dataset, sampler, micro_size=config.batch.micro_size, pin_memory=pin_memory))


def _open_record(
    ready: ReadyRun, log: MetricsLog, trackers: Trackers, estimate: MemoryEstimate, *, ready_s: float
) -> None:
    """Write the run's files, say what is about to run, and begin the record; all ranks take part.

    Raises:
        UserError: A tracker does not open, or a rank does not see the run directory.
    """
    run_dir, fault = ready.start.run_dir, None
    if ready.world.is_main:
        try:
            _begin_record(ready, log, trackers, estimate, ready_s=ready_s)
        except UserError as error:
            fault = str(error)
    if fault := distributed.agree(fault):
        raise UserError(fault)
    require_shared(run_dir)
    logs = run_dir / "logs"
    if streams.keep_in(logs / f"rank-{ready.world.rank:05d}.log"):
        log.say(f"what libraries say: {logs}")


def _begin_record(
    ready: ReadyRun, log: MetricsLog, trackers: Trackers, estimate: MemoryEstimate, *, ready_s: float
) -> None:
    """Write the files of rank zero."""
    config, world, start, schedule = ready.config, ready.world, ready.start, ready.schedule
    run_dir, state = start.run_dir, start.state
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in ready.task.parameters())
    reader = choose_reader(config.data.reader)
    compiled = ", compiled blocks" if config.model.compile_blocks else ""
    graph = "steps as a CUDA graph" if ready.eager is None else f"no CUDA graph ({ready.eager})"
    log.say(
        f"{config.recipe}: ViT-{config.model.size}, {parameters / 1e6:.1f} M parameters, {config.tokens}\n"
        f"{world.size} x {ready.device.type}, ZeRO-{state.zero_stage}, {state.computes_in}, "
        f"attention {ready.attention}{compiled}, {ready.gradients} gradients, {graph}, videos by {reader}, "
        f"batch {config.batch.global_size} = {config.batch.micro_size} x {world.size} x "
        f"{config.batch.accumulation_steps(world.size)}, "
        f"{schedule.end_step} steps of {schedule.steps_per_epoch} an epoch"
    )
    log.say(describe_estimate(estimate))
    set_aside(start.damaged)
    pointer_fault = find_pointer_fault(run_dir)
    if pointer_fault:
        log.say(f"warning: {pointer_fault}; the newest complete checkpoint counts")
    if start.checkpoint is not None:
        point_to_latest(run_dir, start.checkpoint)
    for folder in unfinished_saves(run_dir):
        log.say(f"warning: {folder} is a save that did not come to its end; passing it over")
    for note in (describe_strangers(run_dir), *start.notes):
        if note:
            log.say(f"warning: {note}")
    write_run_files(run_dir, config, ready.ds_config)
    show_run(trackers, run_dir, config, ready.ds_config, schedule.start_step)
    _describe_classes(ready.lists, run_dir, log)
    if ready.lists.note:
        log.say(f"warning: {ready.lists.note}")
    restored = start.describe()
    if restored:
        log.say(f"{restored}; ready in {ready_s:.1f} s")
    log.write(
        "event",
        schedule.start_step,
        event="resume" if start.checkpoint else "start",
        world_size=world.size,
        zero_stage=state.zero_stage,
        dtype=state.dtype,
        autocast=state.autocast,
        attention=ready.attention,
        gradients=ready.gradients,
        compile_blocks=config.model.compile_blocks,
        cuda_graph=ready.eager is None,
        reader=reader,
        parameters=parameters,
        ready_s=round(ready_s, 2),
        init_from=None if start.init_from is None else str(start.init_from),
        groups=ready.groups,
    )


def _describe_classes(lists: Lists, run_dir: Path, log: MetricsLog) -> None:
    """Write the names of the classes, and say what they are scored on."""
    classes, config = lists.classes, lists.config
    if classes is None or not isinstance(config, FinetuneConfig):
        return
    if classes.names is not None:
        write_atomically(run_dir / "classes.txt", "\n".join(classes.names) + "\n")
    every = config.run.validate_every_epochs
    scored = f"scored on {len(lists.val)} every {every} epochs" if lists.val else "not scored during training"
    log.say(f"{classes.num} classes, {len(lists.train)} training videos, {scored}")
