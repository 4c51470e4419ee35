"""Runs or resumes a training: process group, owner of the directory, loop, record."""

import contextlib
import time
from dataclasses import replace
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.console.messages import say
from everest_ds.data.clips.dataset import make_loader
from everest_ds.data.clips.sampling import GlobalBatchSampler
from everest_ds.data.loading.pool import start_fork_server
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.planning.memory import estimate_memory
from everest_ds.train.checkpoints.owner import Holding, owning
from everest_ds.train.checkpoints.run_dir import Resume, find_resume
from everest_ds.train.checkpoints.save import TrainState, point_to_best
from everest_ds.train.checkpoints.saving.writer import Writer, writing
from everest_ds.train.checkpoints.start import Start
from everest_ds.train.job import TrainingJob
from everest_ds.train.loop import Trainer
from everest_ds.train.precision import Precision
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.record.ownership import Ownership
from everest_ds.train.record.start_times import FirstStep, StartTimes
from everest_ds.train.record.summary import describe_nothing_left, describe_run
from everest_ds.train.record.view import make_view
from everest_ds.train.signals import EXIT_STOPPED
from everest_ds.train.step.updater import make_updater
from everest_ds.train.trackers.group import Trackers
from everest_ds.training_run.callbacks import make_callbacks, make_watchdog
from everest_ds.training_run.ready import ReadyRun, check_alone, make_ready
from everest_ds.training_run.record import open_record


def run(job: TrainingJob, world: World) -> int:
    """Run or resume a training of either task.

    Returns:
        The exit code: 0, or `EXIT_STOPPED` if a signal stopped the run early and everything is saved.

    Raises:
        UserError: A fault that the user can fix: DeepSpeed file, weights, too many bad videos.
    """
    times = StartTimes()
    attention, precision = check_alone(job)
    times.end("imports and lists")
    if job.lists.config.data.num_workers:
        start_fork_server()
    with writing(behind=job.lists.config.run.save_async) as writer:
        device = distributed.start(world)  # from here on errors must be agreed on by all ranks
        with owning(job.resume.run_dir, world) as holding:
            job = replace(job, resume=look_again(job, world))
            times.end("meeting the other ranks")
            taken, end_step = _train(job, world, device, attention, precision, holding, writer, times)
    distributed.finish()
    return 0 if taken >= end_step else EXIT_STOPPED


def look_again(job: TrainingJob, world: World) -> Resume:
    """Return where the run resumes, as rank 0 sees it, on all ranks; called once this launch owns the directory.

    The previous owner may have saved after the command line was read.
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
    """Train in a directory that this launch owns; return the steps taken and the steps of the whole run."""
    began = time.perf_counter()
    ready = make_ready(job, world, device, attention, precision, times)
    start, schedule = ready.start, ready.schedule
    estimate = estimate_memory(ready.config, ready.ds_config, world_size=world.size, device_type=device.type)
    trackers = Trackers(ready.config.run.log_to)
    record = MetricsLog(start.run_dir, schedule.start_step, is_main=world.is_main, trackers=trackers)
    view = make_view(schedule, ready.config.run.log_every_steps)
    with contextlib.closing(record) as log, contextlib.closing(view):
        open_record(ready, log, trackers, estimate, ready_s=time.perf_counter() - began)
        state = _with_best(start, world)
        updater = make_updater(ready.engine, ready.config.optim, ready.ds_config, captures=ready.eager is None)
        watchdog = make_watchdog(ready)
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


def _with_best(start: Start, world: World) -> TrainState:
    """Return the state at the start, without the best score if its checkpoint is missing. All ranks agree."""
    step = start.state.best_step
    found = distributed.gather_objects(point_to_best(start.run_dir, step) if world.is_main else False)
    if step is None or found[0]:
        return start.state
    if world.is_main:
        say(f"warning: the best checkpoint, of step {step}, is missing; the next score counts as the best")
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
