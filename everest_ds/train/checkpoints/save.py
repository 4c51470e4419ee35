"""Saves checkpoints: DeepSpeed's shards, a state file, and a seal that is written last.

RUN/checkpoints/step-00001200/ gets its name only when every rank's shards are on disk and sealed with sizes and
checksums; then RUN/checkpoints/latest points to it. An interrupted save leaves a folder named tmp-*, which nothing
reads and the next save removes.
"""

import copyreg
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from everest_ds import distributed
from everest_ds.console.messages import say
from everest_ds.distributed import World
from everest_ds.errors import UserError, escaped
from everest_ds.files import move_aside, parse_json, sync, write_atomically
from everest_ds.train.checkpoints.listing import (
    BEST,
    FORMAT,
    LATEST,
    STATE,
    find_outline_fault,
    folder_of,
    leftovers,
    sound_checkpoints,
)
from everest_ds.train.checkpoints.run_config import CONFIG
from everest_ds.train.checkpoints.seal import (
    SEAL,
    find_damage,
    is_sealed,
    remove_sealed,
    seal,
    try_together,
)


def find_best(run_dir: Path) -> Path | None:
    """Return the checkpoint with the highest validation score, or None without scores; see `read_pointer`."""
    return require_pointer(run_dir, BEST) if (folder_of(run_dir) / BEST).is_file() else None


def read_pointer(run_dir: Path, name: str) -> Path:
    """Return the checkpoint that a pointer of a run names.

    Raises:
        UserError: There is no pointer, it is empty, or it does not name a complete checkpoint.
    """
    pointer = folder_of(run_dir) / name
    try:
        target = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{pointer} cannot be read: {error}") from error
    if not target:
        raise UserError(f"{pointer} is empty")
    if Path(target).name != target or not is_sealed(pointer.parent / target):
        raise UserError(f"{pointer} names {target!r}, which is not a complete checkpoint")
    return pointer.parent / target


def require_pointer(run_dir: Path, name: str) -> Path:
    """Return the checkpoint that a pointer names; the error says what to name instead; see `read_pointer`."""
    try:
        return read_pointer(run_dir, name)
    except UserError as error:
        raise UserError(f"{error}; name a folder {folder_of(run_dir)}/step-... instead") from error


def point_to_best(run_dir: Path, step: int | None) -> bool:
    """Point to the checkpoint of the best step; return whether it exists. Rank zero only.

    Without a step, or if its checkpoint is gone because the run resumed from an older one, the pointer is removed.
    """
    pointer = folder_of(run_dir) / BEST
    target = folder_of(run_dir) / f"step-{step or 0:08d}"
    if step is None or not is_sealed(target):
        if pointer.is_symlink() or not pointer.is_dir():  # a folder is not ours
            pointer.unlink(missing_ok=True)
        return False
    _point(pointer, target)
    return True


def point_to_latest(run_dir: Path, checkpoint: Path) -> None:
    """Point `latest` to the checkpoint that a run resumes from. Rank zero only."""
    if checkpoint.parent.resolve() == folder_of(run_dir).resolve():
        _point(folder_of(run_dir) / LATEST, checkpoint)


def _point(pointer: Path, checkpoint: Path) -> None:
    """Make a pointer name a checkpoint; a folder with the pointer's name is renamed."""
    if not pointer.is_symlink() and pointer.is_dir():
        move_aside(pointer, f"odd-{pointer.name}")
    write_atomically(pointer, checkpoint.name + "\n")


# The moving average of the weights, if a run has one.
AVERAGE = "ema.safetensors"
# Marks of the RuntimeError that torch's file writer raises when a disk is full.
TORCH_WRITER = ("inline_container", "PytorchStreamWriter")


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The state of a run; everything else about its data follows from the seed and the step.

    Attributes:
        step: Optimiser steps taken.
        epoch: Whole epochs.
        samples: Clips seen.
        num_bad: Unreadable draws so far.
        num_skipped: Steps skipped because a gradient was not finite.
        best_step: Step of the highest validation score; None before the first.
        best_score: That score.
        threshold: The running quantile of importance, if the budget has one.
        world_size: Ranks that wrote the shards.
        zero_stage: How they are sharded.
        dtype: Dtype of the model's weights, bfloat16 or float32.
        autocast: Whether float32 weights have bfloat16 matmuls, by autocast.
        videos: Fingerprint of the training list.
        contents: Fingerprint of a sample of its videos' contents; None from older versions.
        val_videos: Fingerprint of the validation list that the best score is for; None without one.
        val_contents: Like ``contents``, for the validation list.
        format: Version of the checkpoint's layout.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    num_bad: int = 0
    num_skipped: int = 0
    best_step: int | None = None
    best_score: float | None = None
    threshold: float | None = None
    world_size: int
    zero_stage: int
    dtype: str
    autocast: bool = False
    videos: str
    contents: str | None = None
    val_videos: str | None = None
    val_contents: str | None = None
    format: int = FORMAT

    @property
    def computes_in(self) -> str:
        return f"{self.dtype} with matmuls in bfloat16" if self.autocast else self.dtype


def universal_of(checkpoint: Path) -> Path:
    """Return the path of a checkpoint's universal copy, which is removed together with the checkpoint."""
    return checkpoint.with_name(f"universal-{checkpoint.name}")


def save_checkpoint(
    engine: Any,
    run_dir: Path,
    state: TrainState,
    world: World,
    *,
    extra_bytes: int = 0,
    write_more: Sequence[Callable[[Path], None]] = (),
) -> Path:
    """Save a checkpoint and wait until it is complete; all ranks take part. Returns its folder.

    Args:
        engine: The DeepSpeed engine.
        run_dir: The run directory.
        state: The state of the run.
        world: This rank and the number of ranks.
        extra_bytes: About how many bytes `write_more` writes.
        write_more: Write more files into the folder before it is sealed; called on every rank.

    Raises:
        UserError: The disk is full or cannot be written to; earlier checkpoints are unchanged.
    """
    folder, (temporary, final) = folder_of(run_dir), folders_of_save(run_dir, state.step)
    make_room(run_dir, temporary, checkpoint_bytes(engine.module) + extra_bytes, world)
    run_deepspeed(engine, temporary)
    all_must(world, folder, lambda: [write(temporary) for write in write_more])
    write_state = partial(_write_state, temporary, state, run_dir)
    all_must(world, folder, lambda: write_state() if world.is_main else None)
    all_must(world, folder, lambda: seal(temporary, world))
    all_must(world, folder, lambda: publish(temporary, final) if world.is_main else None)
    return final


def folders_of_save(run_dir: Path, step: int) -> tuple[Path, Path]:
    """Return a checkpoint's temporary and its final folder."""
    final = folder_of(run_dir) / f"step-{step:08d}"
    return final.with_name(f"tmp-{final.name}"), final


def pickle_stages_by_value() -> None:
    """Pickle DeepSpeed's enumeration by value: Python 3.11.0 to 3.11.3 would name getattr in each shard."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


def run_deepspeed(engine: Any, temporary: Path) -> None:
    """Let DeepSpeed save its shards; all ranks take part.

    Raises:
        UserError: This rank cannot save. The others wait for it in DeepSpeed's barrier, so it must exit at once,
            and the launcher ends them.
    """
    pickle_stages_by_value()
    try:
        engine.save_checkpoint(str(temporary.parent), tag=temporary.name, save_latest=False)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) or any(name in str(error) for name in TORCH_WRITER):
            raise UserError(unwritten(temporary.parent, str(error).splitlines()[0])) from error
        raise


def checkpoint_bytes(module: Any) -> int:
    """Return about how many bytes a checkpoint takes: weights, and float32 copies and moments of trained ones."""
    total = 0
    for parameter in module.parameters():
        trained = 12 if parameter.requires_grad else 0
        total += getattr(parameter, "ds_numel", parameter.numel()) * (parameter.element_size() + trained)
    return total


def bytes_of_rank(module: Any, stage: int, world: World) -> int:
    """Return about how many bytes of a checkpoint this rank writes at a ZeRO stage; see `checkpoint_bytes`."""
    weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in module.parameters())
    return share_of_rank(checkpoint_bytes(module), weights, stage, world_size=world.size, is_main=world.is_main)


def share_of_rank(total: int, weights: int, stage: int, *, world_size: int, is_main: bool) -> int:
    """Return how many bytes of a checkpoint a rank writes, from the total bytes and those of the weights."""
    if stage == 0:
        return total if is_main else 0
    if stage == 3:
        return total // world_size
    return (weights if is_main else 0) + (total - weights) // world_size


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Which checkpoints of a run are kept: the newest, multiples of a number of steps, and the best one."""

    keep_last: int
    keep_every_steps: int | None
    best_step: int | None


def keep_within(run_dir: Path, keeping: Keeping) -> None:
    """Point to the best checkpoint and remove those that are not kept; called by rank zero, after a save."""
    point_to_best(run_dir, keeping.best_step)
    prune_checkpoints(
        run_dir,
        keep_last=keeping.keep_last,
        keep_every_steps=keeping.keep_every_steps,
        keep_step=keeping.best_step,
    )


def prune_checkpoints(
    run_dir: Path, *, keep_last: int, keep_every_steps: int | None = None, keep_step: int | None = None
) -> list[Path]:
    """Remove complete checkpoints, except the newest ``keep_last``, multiples of ``keep_every_steps``, and
    ``keep_step``.

    Called by rank zero after a save. Folders that are not the checkpoints of their names neither count nor are
    removed. Returns the removed folders.
    """
    removed = []
    for checkpoint in sound_checkpoints(run_dir)[max(keep_last, 1) :]:
        step = int(checkpoint.name.removeprefix("step-"))
        if step == keep_step or (keep_every_steps and step % keep_every_steps == 0):
            continue
        remove_sealed(universal_of(checkpoint))
        remove_sealed(checkpoint)
        removed.append(checkpoint)
    return removed


def set_aside(checkpoints: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that they are not resumed from or counted as kept."""
    for checkpoint in checkpoints:
        remove_sealed(universal_of(checkpoint))
        try:
            move_aside(checkpoint, f"damaged-{checkpoint.name}")
        except OSError as error:
            say(f"warning: {checkpoint} cannot be renamed: {error.strerror}")


def read_state(checkpoint: Path) -> TrainState:
    """Read the state of a checkpoint.

    Raises:
        UserError: The folder is not a complete checkpoint, or is of another version.
    """
    if not is_sealed(checkpoint):
        raise UserError(f"{checkpoint} is not a complete checkpoint: it has no {SEAL}")
    try:
        raw = parse_json((checkpoint / STATE).read_text())
        if raw.get("format", FORMAT) > FORMAT:
            raise UserError(
                f"{checkpoint} has format {raw['format']}; this version of everest_ds reads up to {FORMAT}: "
                "update it"
            )
        return _require_kinds(TrainState(**raw))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        why = escaped(str(error))
        raise UserError(f"{checkpoint / STATE} cannot be read, or is another version's: {why}") from error


def _require_kinds(state: TrainState) -> TrainState:
    """Return a state; refuse fields of wrong types and counts out of range."""
    for name, hint in get_type_hints(TrainState).items():
        value = getattr(state, name)
        is_kind = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
        if not is_kind or (isinstance(value, int) and not 0 <= value < 2**53):
            raise ValueError(f"{name}={value!r:.40}")
    if state.zero_stage > 3 or state.world_size < 1:
        raise ValueError(f"{state.world_size} processes at ZeRO stage {state.zero_stage}")
    return state


def find_fault(checkpoint: Path, world: World) -> str | None:
    """Return why a checkpoint cannot be used, from this rank's share of its files; None if they are undamaged."""
    return find_outline_fault(checkpoint) or find_damage(checkpoint, world)


def choose_checkpoint(candidates: Sequence[Path], world: World, *, exact: bool) -> Path | None:
    """Return the first candidate whose files match its seal; all ranks take part and agree.

    Damaged candidates are reported and skipped, unless a checkpoint was named.

    Raises:
        UserError: The named checkpoint is damaged, or all candidates are.
    """
    faults = []
    for checkpoint in candidates:
        started = time.perf_counter()
        fault = distributed.agree(find_fault(checkpoint, world))
        if fault is None:
            if world.is_main:
                say(f"verified {checkpoint} in {time.perf_counter() - started:.2f} s")
            return checkpoint
        faults.append(f"checkpoint {checkpoint} is damaged: {fault}")
        if world.is_main and not exact:
            say(escaped(f"warning: {faults[-1]}; skipping it"))
    if faults:
        raise UserError("; ".join(faults) + "; name another with --resume PATH, or start afresh in another --out")
    return None


def require_same_start(checkpoint: Path, was: TrainState, now: TrainState) -> None:
    """Refuse to resume from a checkpoint of another precision or training list."""
    if was.computes_in != now.computes_in:
        raise UserError(
            f"{checkpoint} was written in {was.computes_in}, but this run computes in {now.computes_in}; change "
            "--precision"
        )
    if was.videos != now.videos:
        raise UserError(
            f"{checkpoint} was written with another training list ({was.videos}, now {now.videos}), so order and "
            "schedule would change. Restore the list, or start a new run from these weights: --init-from "
            f"{checkpoint.parent.parent} --out ANOTHER"
        )


def make_room(
    run_dir: Path, temporary: Path, needed: int, world: World, *, require: Callable[[], object] = lambda: None
) -> None:
    """Remove unfinished saves, and refuse a save that does not fit before anything is written; all ranks take part.

    ``require`` is called on every rank, and raises an OSError if that rank cannot save.
    """
    folder = folder_of(run_dir)

    def prepare() -> None:
        require()
        if world.is_main:
            _make_room(folder, temporary, needed)

    all_must(world, folder, prepare)


def _make_room(folder: Path, temporary: Path, needed: int) -> None:
    """Remove unfinished saves, and refuse a save that does not fit."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if os.path.lexists(temporary):
        move_aside(temporary, f"odd-{temporary.name}")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"a checkpoint takes about {needed / 2**20:.0f} MiB, but {free / 2**20:.0f} MiB are free")


def publish(temporary: Path, final: Path) -> None:
    """Give a sealed folder its final name, replacing an older save of the same step, and point to it."""
    remove_sealed(universal_of(final))
    if is_sealed(final) and find_outline_fault(final) is None:
        remove_sealed(final)
    elif os.path.lexists(final):
        move_aside(final, f"odd-{final.name}")
    temporary.rename(final)
    sync(final.parent)
    _point(final.parent / LATEST, final)


def _write_state(folder: Path, state: TrainState, run_dir: Path) -> None:
    for name, content in describing_files(state, run_dir):
        write_atomically(folder / name, content)


def describing_files(state: TrainState, run_dir: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the small files of a checkpoint: its state, and a backup of the configuration."""
    yield STATE, (json.dumps(asdict(state), indent=2) + "\n").encode()
    if (run_dir / CONFIG).is_file():
        yield CONFIG, (run_dir / CONFIG).read_bytes()


def all_must(world: World, folder: Path, action: Callable[[], object]) -> None:
    """Run a part of a save on every rank; if it fails on one, all stop and the unfinished folder is removed."""
    fault = try_together(action)
    if fault is None:
        return
    if world.is_main:
        remove_leftovers(folder)
    raise UserError(unwritten(folder, fault))


def remove_leftovers(folder: Path) -> None:
    """Remove the remains of unfinished saves in a folder of checkpoints."""
    for leftover in leftovers(folder):
        shutil.rmtree(leftover, ignore_errors=True)


def unwritten(folder: Path, fault: str) -> str:
    """Return the message for a save that failed."""
    return f"no checkpoint could be written to {folder}: {fault}; earlier ones are kept. Free space and start again"
