"""Checkpoints: DeepSpeed's shards, a state file, and a seal that is written last.

RUN/checkpoints/step-00001200/ appears under its name only when every rank's shards are on disk and complete.json,
with sizes and checksums, is written; then RUN/checkpoints/latest points to it. A save that dies leaves a folder
named tmp-* that nothing reads.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everest_ds import distributed
from everest_ds.distributed import World
from everest_ds.errors import UserError

STATE, SEAL, LATEST = "state.json", "complete.json", "latest"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands; everything else about its data follows from the seed and the step.

    Attributes:
        step: Optimiser steps taken.
        epoch: Whole epochs gone by.
        samples: Clips seen.
        world_size: Processes that wrote the shards.
        zero_stage: How they are sharded.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    world_size: int
    zero_stage: int


def folder_of(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def save_checkpoint(engine: Any, run_dir: Path, state: TrainState, world: World) -> Path:
    """Save a checkpoint; all ranks take part. Returns its folder."""
    folder = folder_of(run_dir)
    name = f"step-{state.step:08d}"
    temporary, final = folder / f"tmp-{name}", folder / name
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    distributed.barrier()
    if world.is_main:
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
        _write_durably(temporary / SEAL, json.dumps({"files": _manifest(temporary)}, indent=2) + "\n")
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _write_durably(folder / f"{LATEST}.tmp", name + "\n")
        (folder / f"{LATEST}.tmp").replace(folder / LATEST)
    distributed.barrier()
    return final


def find_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None when it has none."""
    sealed = sorted(path.parent for path in folder_of(run_dir).glob(f"step-*/{SEAL}"))
    return sealed[-1] if sealed else None


def read_state(checkpoint: Path) -> TrainState:
    """Read where a checkpoint stands.

    Raises:
        UserError: The folder is no complete checkpoint.
    """
    if not (checkpoint / SEAL).is_file():
        raise UserError(f"{checkpoint} is no complete checkpoint: it has no {SEAL}")
    return TrainState(**json.loads((checkpoint / STATE).read_text()))


def verify_checkpoint(checkpoint: Path) -> None:
    """Compare every file of a checkpoint with its seal.

    Raises:
        UserError: A file is missing or differs in size or checksum.
    """
    files = json.loads((checkpoint / SEAL).read_text())["files"]
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} is missing")
        if path.stat().st_size != expected["size"]:
            raise UserError(
                f"checkpoint {checkpoint} is damaged: {name} has {path.stat().st_size} bytes, "
                f"expected {expected['size']}"
            )
        if _sha256(path) != expected["sha256"]:
            raise UserError(f"checkpoint {checkpoint} is damaged: the checksum of {name} differs")


def load_checkpoint(engine: Any, checkpoint: Path, state: TrainState, *, world: World, zero_stage: int) -> None:
    """Load a checkpoint into the engine; all ranks take part, and all stop when one cannot.

    Raises:
        UserError: The checkpoint is damaged, or was written by another number of processes or ZeRO stage.
    """
    fault = None
    if (state.world_size, state.zero_stage) != (world.size, zero_stage):
        fault = (
            f"{checkpoint} was written by {state.world_size} processes at ZeRO stage {state.zero_stage}; this run "
            f"has {world.size} at stage {zero_stage}: resume with the same numbers"
        )
    elif world.is_main:
        try:
            verify_checkpoint(checkpoint)
        except UserError as error:
            fault = str(error)
    fault = distributed.agree(fault)
    if fault:
        raise UserError(fault)
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    fault = distributed.agree(None if loaded else f"DeepSpeed did not load {checkpoint}")
    if fault:
        raise UserError(fault)


def _manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
