"""The callbacks of a run."""

from everest_ds.config import FinetuneConfig
from everest_ds.inference.validation import Validation
from everest_ds.planning.memory import GIB, MemoryEstimate
from everest_ds.train.callbacks import Callback
from everest_ds.train.checkpoints.save import TrainState
from everest_ds.train.record.bad_samples import BadSamples
from everest_ds.train.record.capture import CaptureLog
from everest_ds.train.record.frames import FrameLog, chooses_frames
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.record.pictures import Pictures
from everest_ds.train.record.profile import RunProfile
from everest_ds.train.record.progress import MemoryComparison, StallHint
from everest_ds.train.record.skipped_steps import SkippedSteps
from everest_ds.train.step.updater import Updater
from everest_ds.train.watch.slow_ranks import SlowRanks
from everest_ds.train.watch.watchdog import Watchdog
from everest_ds.train.watch.weights import SameWeights
from everest_ds.training_run.ready import ReadyRun


def make_callbacks(
    ready: ReadyRun, updater: Updater, state: TrainState, log: MetricsLog, estimate: MemoryEstimate
) -> list[Callback]:
    """Return the callbacks of a run, in the order in which they are called. A new concern is one more line here."""
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


def make_watchdog(ready: ReadyRun) -> Watchdog:
    """Return the watchdog, which ends a run that hangs; it waits longer than the loader waits for a clip."""
    data = ready.config.data
    return Watchdog(
        ready.start.run_dir,
        ready.world,
        hang_after_s=ready.config.run.hang_after_s,
        loader_s=data.timeout_s if data.num_workers else 0.0,
    )
