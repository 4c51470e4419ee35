"""What a run writes into its directory and says to people, at its start and at its end. Rank zero only."""

import shlex
from typing import TYPE_CHECKING, Any

from everest_ds import distributed
from everest_ds.data.lists.run_lists import Lists
from everest_ds.files import write_atomically
from everest_ds.train.checkpoints.run_dir import find_pointer_fault, write_run_files
from everest_ds.train.checkpoints.save import unfinished_saves

if TYPE_CHECKING:
    from everest_ds.train.checkpoints.start import Start
    from everest_ds.train.loop import Trainer


def open_run(
    trainer: "Trainer", lists: Lists, ds_config: dict[str, Any], start: "Start", backend: str, *, ready_s: float
) -> None:
    """Write the run's files, open its record, and say what is about to run. Rank zero only."""
    from everest_ds.data.readers.choice import choose_reader
    from everest_ds.planning.memory import describe_estimate, estimate_memory
    from everest_ds.train.record.metrics import MetricsLog, drop_later_bad_samples

    config, world, schedule, state = trainer.config, trainer.world, trainer.schedule, trainer.start
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.task.parameters())
    reader = choose_reader(config.data.reader)
    compiled = ", compiled blocks" if config.model.compile_blocks else ""
    accumulation = config.batch.accumulation_steps(world.size)
    print(
        f"{config.recipe}: ViT-{config.model.size}, {parameters / 1e6:.1f} M parameters, "
        f"{config.tokens}\n"
        f"{world.size} x {trainer.device.type}, ZeRO-{state.zero_stage}, {state.computes_in}, "
        f"attention {backend}{compiled}, videos by {reader}, "
        f"batch {config.batch.global_size} = {config.batch.micro_size} x {world.size} x {accumulation}, "
        f"{schedule.end_step} steps of {schedule.steps_per_epoch} an epoch",
        flush=True,
    )
    print(describe_estimate(estimate_memory(config, ds_config, world_size=world.size)), flush=True)
    pointer_fault = find_pointer_fault(trainer.run_dir)
    if pointer_fault:
        print(f"warning: {pointer_fault}; the newest complete checkpoint counts", flush=True)
    for folder in unfinished_saves(trainer.run_dir):
        print(f"warning: {folder} is a save that did not come to its end; passing it over", flush=True)
    write_run_files(trainer.run_dir, config, ds_config)
    if lists.classes is not None:
        _describe_classes(trainer, lists)
    drop_later_bad_samples(trainer.run_dir / "bad_samples.jsonl", state.num_bad)
    trainer.log = MetricsLog(trainer.run_dir, schedule.start_step)
    restored = start.describe()
    if restored:
        print(f"{restored}; ready in {ready_s:.1f} s", flush=True)
    trainer.log.write(
        "event",
        schedule.start_step,
        event="resume" if start.checkpoint else "start",
        world_size=world.size,
        zero_stage=state.zero_stage,
        dtype=state.dtype,
        autocast=state.autocast,
        attention=backend,
        compile_blocks=config.model.compile_blocks,
        reader=reader,
        parameters=parameters,
        ready_s=round(ready_s, 2),
        init_from=None if start.init_from is None else str(start.init_from),
        groups=trainer.groups,
    )


def _describe_classes(trainer: "Trainer", lists: Lists) -> None:
    """Write the names of the classes, and say what they are scored on."""
    classes = lists.classes
    assert classes is not None
    if classes.names is not None:
        write_atomically(trainer.run_dir / "classes.txt", "\n".join(classes.names) + "\n")
    every = trainer.config.run.validate_every_epochs  # type: ignore[attr-defined]
    scored = f"scored on {len(lists.val)} every {every} epochs" if lists.val else "not scored during training"
    print(f"{classes.num} classes, {len(lists.train)} training videos, {scored}", flush=True)
    if lists.note:
        print(f"warning: {lists.note}", flush=True)


def close_run(trainer: "Trainer", taken: int) -> None:
    """Say how the run ended and close its record. Rank zero only."""
    schedule, log = trainer.schedule, trainer.log
    if log is None:
        return
    if schedule.num_left <= 0:
        limit = trainer.config.run.max_steps
        longer = "raise --run.max-steps, or " if limit is not None and schedule.end_step == limit else ""
        print(
            f"nothing left to do: step {schedule.start_step} of {schedule.end_step}; to train longer, {longer}"
            f"start a new run from these weights: --init-from {shlex.quote(str(trainer.run_dir))} --out ANOTHER",
            flush=True,
        )
    if taken >= schedule.end_step:
        log.write("event", taken, event="end")
        print(f"done: {trainer.run_dir}", flush=True)
    log.close()


def compare_memory(trainer: "Trainer", ds_config: dict[str, Any], taken: int) -> None:
    """Record the peak of the process that held most beside what `everest plan` expects of it."""
    from everest_ds.planning.memory import GIB, describe_peak, estimate_memory
    from everest_ds.train.record.metrics import peak_memory_gib

    peak_gib = max(distributed.gather_objects(peak_memory_gib(trainer.device)))
    if trainer.log is None:
        return
    estimate = estimate_memory(trainer.config, ds_config, world_size=trainer.world.size)
    values = {"peak_gib": round(peak_gib, 3), "estimated_gib": round(estimate.allocated / GIB, 3)}
    trainer.log.write("event", taken, event="memory", device=trainer.device.type, **values)
    if trainer.device.type == "cuda":
        print(describe_peak(estimate, peak_gib), flush=True)
    else:  # Python and its libraries are in it
        print(
            f"peak resident memory {peak_gib:.2f} GiB, tensors estimated {values['estimated_gib']:.2f}", flush=True
        )
