"""The files that a run writes, and the lines that it prints, before its first step."""

from pathlib import Path

from everest_ds import distributed
from everest_ds.config import FinetuneConfig
from everest_ds.console import streams
from everest_ds.data.lists.run_lists import Lists
from everest_ds.data.readers.choice import choose_reader
from everest_ds.errors import UserError
from everest_ds.files import write_atomically
from everest_ds.planning.memory import MemoryEstimate, describe_estimate
from everest_ds.recipes import RECIPES
from everest_ds.train.checkpoints.listing import describe_strangers, unfinished_saves
from everest_ds.train.checkpoints.run_dir import find_pointer_fault, require_shared, write_run_files
from everest_ds.train.checkpoints.save import point_to_latest, set_aside
from everest_ds.train.checkpoints.start import Start
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.trackers.group import Trackers
from everest_ds.train.trackers.opening import show_run
from everest_ds.training_run.ready import ReadyRun


def open_record(
    ready: ReadyRun, log: MetricsLog, trackers: Trackers, estimate: MemoryEstimate, *, ready_s: float
) -> None:
    """Write the run's files, print a summary of the run, and begin the record. All ranks must call it.

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
        log.say(f"output of libraries: {logs}")


def _begin_record(
    ready: ReadyRun, log: MetricsLog, trackers: Trackers, estimate: MemoryEstimate, *, ready_s: float
) -> None:
    """Write the files of rank 0, and print the summary."""
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
    _describe_checkpoints(start, log)
    write_run_files(run_dir, config, ready.ds_config)
    recipe = RECIPES.get(config.recipe)
    show_run(
        trackers,
        run_dir,
        config,
        ready.ds_config,
        start_step=schedule.start_step,
        recipe=recipe and recipe(),
        precision=state.computes_in,
    )
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


def _describe_checkpoints(start: Start, log: MetricsLog) -> None:
    """Set damaged checkpoints aside, repair the pointer to the newest one, and warn of what is odd."""
    run_dir = start.run_dir
    set_aside(start.damaged)
    pointer_fault = find_pointer_fault(run_dir)
    if pointer_fault:
        log.say(f"warning: {pointer_fault}; the newest complete checkpoint is used instead")
    if start.checkpoint is not None:
        point_to_latest(run_dir, start.checkpoint)
    for folder in unfinished_saves(run_dir):
        log.say(f"warning: {folder} is an unfinished save; it is ignored")
    for note in (describe_strangers(run_dir), *start.notes):
        if note:
            log.say(f"warning: {note}")


def _describe_classes(lists: Lists, run_dir: Path, log: MetricsLog) -> None:
    """Write the names of the classes, and print how the run is scored."""
    classes, config = lists.classes, lists.config
    if classes is None or not isinstance(config, FinetuneConfig):
        return
    if classes.names is not None:
        write_atomically(run_dir / "classes.txt", "\n".join(classes.names) + "\n")
    every = config.run.validate_every_epochs
    scored = f"scored on {len(lists.val)} every {every} epochs" if lists.val else "not scored during training"
    log.say(f"{classes.num} classes, {len(lists.train)} training videos, {scored}")
