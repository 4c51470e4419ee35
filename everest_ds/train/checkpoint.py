"""Checkpoints: DeepSpeed's shards, a state file, and a seal that is written last.

RUN/checkpoints/step-00001200/ appears under its name only when every rank's shards are on disk and complete.json,
with sizes and checksums, is written; then RUN/checkpoints/latest points to it. A save that dies leaves a folder
named tmp-* that nothing reads and the next save removes. All ranks share the work of checksums.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everest_ds import distributed
from everest_ds.distributed import World
from everest_ds.errors import UserError

STATE, SEAL, LATEST = "state.json", "complete.json", "latest"
FileRecord = dict[str, int | str]


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands; everything else about its data follows from the seed and the step.

    Attributes:
        step: Optimiser steps taken.
        epoch: Whole epochs gone by.
        samples: Clips seen.
        num_bad: Unreadable draws so far.
        world_size: Processes that wrote the shards.
        zero_stage: How they are sharded.
        dtype: What the model computes in.
        videos: Fingerprint of the training list.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    num_bad: int = 0
    world_size: int
    zero_stage: int
    dtype: str
    videos: str


def folder_of(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def save_checkpoint(engine: Any, run_dir: Path, state: TrainState, world: World) -> Path:
    """Save a checkpoint; all ranks take part. Returns its folder."""
    folder = folder_of(run_dir)
    name = f"step-{state.step:08d}"
    temporary, final = folder / f"tmp-{name}", folder / name
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("tmp-*"):
            shutil.rmtree(leftover)
    distributed.barrier()
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    if world.is_main:
        _write_durably(temporary / STATE, json.dumps(asdict(state), indent=2) + "\n")
    distributed.barrier()
    # Rank zero's listing counts: on a network file system the others may not see every file yet.
    names = distributed.gather_objects(_files(temporary) if world.is_main else [])[0]
    records = _records(temporary, _share_of(names, world))
    parts = distributed.gather_objects(records)
    if world.is_main:
        manifest = {name: record for part in parts for name, record in sorted(part.items())}
        _write_durably(temporary / SEAL, json.dumps({"files": manifest}, indent=2) + "\n")
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _write_durably(folder / f"{LATEST}.tmp", name + "\n")
        (folder / f"{LATEST}.tmp").replace(folder / LATEST)
    distributed.barrier()
    return final


def prune_checkpoints(run_dir: Path, *, keep_last: int, keep_every_steps: int | None = None) -> list[Path]:
    """Remove complete checkpoints but the newest ``keep_last`` and every multiple of ``keep_every_steps``.

    Called by rank zero, after a save. Returns what was removed.
    """
    removed = []
    for checkpoint in list_checkpoints(run_dir)[max(keep_last, 1) :]:
        if keep_every_steps and read_state(checkpoint).step % keep_every_steps == 0:
            continue
        (checkpoint / SEAL).unlink()  # a removal that dies leaves nothing that looks complete
        shutil.rmtree(checkpoint)
        removed.append(checkpoint)
    return removed


def set_aside(checkpoints: Sequence[Path]) -> None:
    """Rename damaged checkpoints, so that they count neither as a place to resume from nor as ones to keep."""
    for checkpoint in checkpoints:
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, newest first."""
    sealed = sorted(path.parent for path in folder_of(run_dir).glob(f"step-*/{SEAL}"))
    return sealed[::-1]


def unfinished_saves(run_dir: Path) -> list[Path]:
    """Return folders of saves that did not come to their end."""
    folder = folder_of(run_dir)
    unsealed = [path for path in folder.glob("step-*") if not (path / SEAL).is_file()]
    return sorted([*unsealed, *folder.glob("tmp-*")])


def read_state(checkpoint: Path) -> TrainState:
    """Read where a checkpoint stands.

    Raises:
        UserError: The folder is no complete checkpoint, or one of another version.
    """
    if not (checkpoint / SEAL).is_file():
        raise UserError(f"{checkpoint} is no complete checkpoint: it has no {SEAL}")
    try:
        return TrainState(**json.loads((checkpoint / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint / STATE} cannot be read, or is another version's: {error}") from error


def choose_checkpoint(candidates: Sequence[Path], world: World, *, exact: bool) -> Path | None:
    """Return the first candidate whose files are what its seal says; all ranks take part and agree.

    Damaged ones are named and passed over, unless one was asked for by name.

    Raises:
        UserError: The named checkpoint is damaged, or all candidates are.
    """
    faults = []
    for checkpoint in candidates:
        fault = distributed.agree(find_damage(checkpoint, world))
        if fault is None:
            return checkpoint
        faults.append(f"checkpoint {checkpoint} is damaged: {fault}")
        if world.is_main and not exact:
            print(f"warning: {faults[-1]}; passing it over", flush=True)
    if faults:
        raise UserError("; ".join(faults) + "; name another with --resume PATH, or start afresh in another --out")
    return None


def find_damage(checkpoint: Path, world: World) -> str | None:
    """Compare this rank's share of a checkpoint's files with its seal; return the first difference, or None."""
    try:
        files: dict[str, FileRecord] = json.loads((checkpoint / SEAL).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{SEAL} cannot be read: {error}"
    for name in _share_of(sorted(files), world):
        path, expected = checkpoint / name, files[name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['size']}"
        if _sha256(path) != expected["sha256"]:
            return f"the checksum of {name} differs"
    return None


def load_checkpoint(engine: Any, checkpoint: Path) -> None:
    """Load a verified checkpoint into the engine; all ranks take part, and all stop when one cannot.

    Raises:
        UserError: DeepSpeed did not load it on some rank.
    """
    fault = None
    try:
        loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if not loaded:
            fault = f"DeepSpeed did not load {checkpoint}"
    except Exception as error:  # whatever it is, the other ranks must hear of it
        fault = f"DeepSpeed did not load {checkpoint}: {type(error).__name__}: {error}"
    fault = distributed.agree(fault)
    if fault:
        raise UserError(fault)


def require_same_start(checkpoint: Path, was: TrainState, now: TrainState) -> None:
    """Refuse to go on from a checkpoint that was written under other circumstances.

    Raises:
        UserError: Another number of processes, ZeRO stage, precision, or list of videos.
    """
    if (was.world_size, was.zero_stage) != (now.world_size, now.zero_stage):
        raise UserError(
            f"{checkpoint} was written by {was.world_size} processes at ZeRO stage {was.zero_stage}; this run "
            f"has {now.world_size} at stage {now.zero_stage}: resume with the same numbers"
        )
    if was.dtype != now.dtype:
        raise UserError(
            f"{checkpoint} was written in {was.dtype}; this run computes in {now.dtype}: see --precision"
        )
    if was.videos != now.videos:
        raise UserError(
            f"{checkpoint} was written with another training list ({was.videos}, now {now.videos}): order and "
            "schedule would change; restore the list, or start afresh in another --out"
        )


def _files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != SEAL
    )


def _share_of(names: Sequence[str], world: World) -> Sequence[str]:
    return names[world.rank :: world.size]


def _records(folder: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    return {name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
