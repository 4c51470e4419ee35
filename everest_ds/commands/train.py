"""`everest pretrain`: from a resolved configuration to a trained run directory.

The order matters: everything that can be refused is refused before torch is imported and before any process
joins the others, so that a wrong setting costs seconds and ends all ranks alike.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from everest_ds import distributed
from everest_ds.config import Config
from everest_ds.data.index import VideoRow, fingerprint, read_list, require_reachable
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.checkpoint import TrainState, set_aside, unfinished_saves
from everest_ds.train.run_dir import find_pointer_fault, find_resume, require_shared, write_run_files
from everest_ds.train.signals import EXIT_STOPPED

if TYPE_CHECKING:
    import torch

    from everest_ds.train.loop import Trainer
    from everest_ds.train.start import Start


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How a run is started: where, how sharded, in which precision."""

    ds_config: Path | None = None
    """File of ds_configs/: how the run is sharded. Without one, plain ZeRO-2."""
    out: Path | None = None
    """Run directory; without one, that of the checkpoint named by --resume, or runs/RECIPE."""
    resume: Annotated[str, tyro.conf.arg(metavar="{auto,never,PATH}")] = "auto"
    """Go on from the run directory's newest checkpoint, or refuse a used directory, or name a checkpoint."""
    init_from: Path | None = None
    """Start a new run from these weights and nothing else: a run, a checkpoint, an official .pth file, a Hugging
    Face folder, or a file of `everest convert`."""
    init_allow: tuple[str, ...] = ()
    """What of --init-from may be left fresh or ignored, by name: tensors or modules (decoder, head.weight),
    positions, num_heads."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: as the DeepSpeed file says, else bf16 on a GPU and fp32 on a CPU."""


def train(config: Config, options: LaunchOptions, world: World) -> int:
    """Run or continue a pre-training.

    Returns:
        The exit code: 0, or `EXIT_STOPPED` when a signal stopped the run before its end, all saved.

    Raises:
        UserError: Anything the user can mend: lists, batch, run directory, DeepSpeed file, too many bad videos.
    """
    # 1. What needs neither torch nor the other processes.
    rows = _read_rows(config)
    config.batch.accumulation_steps(world.size)
    resume = find_resume(options.out, config, options.resume)

    # 2. What needs torch and DeepSpeed: the systems file, the schedule, the attention backend.
    from everest_ds.train import engine as engines
    from everest_ds.train.schedule import Schedule
    from everest_ds.train.start import choose_start

    systems = engines.load_systems(options.ds_config)
    engines.check_sections(systems, str(options.ds_config))
    Schedule.of(config, len(rows))
    device_type = "cuda" if distributed.select_accelerator() else "cpu"
    bf16 = engines.uses_bf16(systems, options.precision, device_type)
    backend = _attention_backend(config, device_type, "bfloat16" if bf16 else "float32")

    # 3. From here on all processes go together. The run directory is not touched before the checkpoint is loaded.
    device = distributed.start(world)
    ds_config = engines.resolve_ds_config(
        systems, config, world_size=world.size, precision=options.precision, device_type=device.type
    )
    now = TrainState(
        world_size=world.size,
        zero_stage=engines.zero_stage(ds_config),
        dtype="bfloat16" if bf16 else "float32",
        videos=fingerprint(rows),
    )
    began = time.perf_counter()
    start = choose_start(resume, now, world, options.init_from, options.init_allow)
    trainer = _build(config, rows, ds_config, start, world, device)

    # 4. Write down what this is, and go.
    if world.is_main:
        set_aside(start.damaged)
        _open_run(trainer, ds_config, start, backend, ready_s=time.perf_counter() - began)
    distributed.barrier()
    require_shared(start.run_dir)
    taken = trainer.run(_batches(trainer)) if trainer.schedule.num_left > 0 else start.state.step
    _compare_memory(trainer, ds_config, taken)
    _close_run(trainer, taken)
    distributed.finish()
    return 0 if taken >= trainer.schedule.end_step else EXIT_STOPPED


def _close_run(trainer: "Trainer", taken: int) -> None:
    """Say how the run ended and close its record. Rank zero only."""
    schedule, log = trainer.schedule, trainer.log
    if log is None:
        return
    if schedule.num_left <= 0:
        print(f"nothing left to do: step {schedule.start_step} of {schedule.end_step}", flush=True)
    if taken >= schedule.end_step:
        log.write("event", taken, event="end")
        print(f"done: {trainer.run_dir}", flush=True)
    log.close()


def _compare_memory(trainer: "Trainer", ds_config: dict[str, Any], taken: int) -> None:
    """Record the peak of the process that held most beside what `everest plan` expects of it."""
    from everest_ds.train.memory import GIB, describe_peak, estimate_memory
    from everest_ds.train.metrics import peak_memory_gib

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


def _build(
    config: Config,
    rows: list[VideoRow],
    ds_config: dict[str, Any],
    start: "Start",
    world: World,
    device: "torch.device",
) -> "Trainer":
    """Build model and engine and bring them to where the run starts."""
    import torch

    from everest_ds.train.engine import build_engine
    from everest_ds.train.loop import Trainer
    from everest_ds.train.schedule import Schedule
    from everest_ds.train.tasks import make_task

    torch.manual_seed(config.run.seed)
    task = make_task(config)
    with start.ready(task, world) as load:
        engine = build_engine(task, config, ds_config, device, universal=start.reshards)
        load(engine)
    return Trainer(
        engine=engine,
        task=task,
        config=config,
        schedule=Schedule.of(config, len(rows), start_step=start.state.step),
        world=world,
        device=device,
        run_dir=start.run_dir,
        log=None,
        start=start.state,
        rows=rows,
    )


def _batches(trainer: "Trainer") -> Any:
    from everest_ds.data.dataset import make_loader
    from everest_ds.data.sampling import GlobalBatchSampler
    from everest_ds.train.signals import children_ignore_stop_signals, ignore_stop_signals

    config, world, schedule = trainer.config, trainer.world, trainer.schedule
    sampler = GlobalBatchSampler(
        num_samples=len(trainer.rows),
        global_size=config.batch.global_size,
        micro_size=config.batch.micro_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.run.seed,
        start_step=schedule.start_step,
        end_step=schedule.end_step,
    )
    dataset = trainer.task.make_dataset(trainer.rows)
    with children_ignore_stop_signals():
        pin_memory = trainer.device.type == "cuda"
        return iter(make_loader(dataset, sampler, pin_memory=pin_memory, worker_init=ignore_stop_signals))


def _read_rows(config: Config) -> list[VideoRow]:
    if config.data.train_list is None:
        raise UserError(
            "data.train_list is not set; give --data.train-list FILE (`everest demo-data DIR` makes one to try)"
        )
    path = Path(config.data.train_list)
    rows = read_list(path)
    require_reachable(rows, path)
    return rows


def _attention_backend(config: Config, device_type: str, dtype_name: str) -> str:
    """Return the attention backend that will run; refuses one that cannot serve encoder and decoder."""
    import torch

    from everest_ds.model.attention import choose_backend
    from everest_ds.model.sizes import get_size

    size = get_size(config.model.size)
    heads = (size.width // size.num_heads, size.decoder_width // size.decoder_num_heads)
    dtype = torch.bfloat16 if dtype_name == "bfloat16" else torch.float32
    names = [choose_backend(config.model.attention, torch.device(device_type), dtype, head).name for head in heads]
    return names[0]


def _open_run(
    trainer: "Trainer", ds_config: dict[str, Any], start: "Start", backend: str, *, ready_s: float
) -> None:
    """Write the run's files, open its record, and say what is about to run. Rank zero only."""
    from everest_ds.train.memory import describe_estimate, estimate_memory
    from everest_ds.train.metrics import MetricsLog, drop_later_bad_samples

    config, world, schedule, state = trainer.config, trainer.world, trainer.schedule, trainer.start
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.task.parameters())
    accumulation = config.batch.accumulation_steps(world.size)
    print(
        f"{config.recipe}: ViT-{config.model.size}, {parameters / 1e6:.1f} M parameters, "
        f"{config.tokens}\n"
        f"{world.size} x {trainer.device.type}, ZeRO-{state.zero_stage}, {state.dtype}, attention {backend}, "
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
        attention=backend,
        parameters=parameters,
        ready_s=round(ready_s, 2),
        init_from=None if start.init_from is None else str(start.init_from),
    )
