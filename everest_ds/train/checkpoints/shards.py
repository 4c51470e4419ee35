"""Reads a checkpoint's shards, which are pickles, as data, so that no code in a foreign run is run.

Place in the flow: a checkpoint's folder -> `require_data` -> `read_shard`, or DeepSpeed's own loaders inside
`as_data`. `require_data` refuses shards that name other code than DeepSpeed's own shards do, that ask for more
memory than they have values, or whose names would become paths. DeepSpeed then reads with weights_only.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.distributed import World
from everest_ds.errors import UserError, escaped
from everest_ds.model.weights.pickles import look, read_pickle, safe_globals

# The classes that DeepSpeed's shards name (0.19.8, all stages); their constructors and states have no side effects.
OBJECTS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# Parts of other projects' shards from which DeepSpeed's converter would take patterns and file names.
FOREIGN_PARTS = ("universal_checkpoint_info", "ds_autoep_layers", "autoep_layers")
# Names that the converter uses for folders.
NAME = re.compile(r"\w[\w.-]*", re.ASCII)
ADVICE = "No run of everest_ds has such a file; get the run from somebody you trust"
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load then ignores weights_only=False


def require_data(folder: Path, world: World) -> None:
    """Refuse a checkpoint with a shard that has more than data; all ranks take part and get the same result.

    Raises:
        UserError: Names the first such file; no code in it was run.
    """
    fault = distributed.agree(find_code(folder, world))
    if fault:
        raise UserError(fault)


def find_code(folder: Path, world: World) -> str | None:
    """Check this rank's share of a checkpoint's shards; return the first fault, or None."""
    try:
        link = next((path for path in folder.rglob("*") if path.is_symlink() and path.is_dir()), None)
        if link is not None:  # files behind it would be read but not checked
            return f"{link} is a link to a folder, so it was not read. {ADVICE}"
        for path in sorted(folder.rglob("*.pt"))[world.rank :: world.size]:
            _require_names(look(path, OBJECTS, ADVICE), path)
    except (UserError, OSError) as error:
        return str(error)
    return None


def read_shard(path: Path, *, has_objects: bool = False, mmap: bool = False) -> Any:
    """Read a shard as data.

    Args:
        path: A file written by DeepSpeed.
        has_objects: Whether it names DeepSpeed's classes, as states of optimisers do.
        mmap: Read tensors only when they are used.

    Raises:
        UserError: It is not such a file.
    """
    objects = _import_objects() if has_objects else {}
    return read_pickle(path, objects=objects, mmap=mmap, advice=ADVICE)


@contextlib.contextmanager
def as_data() -> Iterator[None]:
    """Restrict DeepSpeed to tensors, containers and a few of its own classes, although it unpickles everything."""
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(safe_globals(_import_objects())):
            yield
    finally:
        os.environ.pop(WEIGHTS_ONLY)
        if before is not None:
            os.environ[WEIGHTS_ONLY] = before


def load_checkpoint(engine: Any, checkpoint: Path) -> None:
    """Load a verified checkpoint into the engine; all ranks take part, and all stop if one fails."""
    fault = None
    try:
        with as_data():
            loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if not loaded:
            fault = f"DeepSpeed did not load {checkpoint}"
    except Exception as error:  # any error: the other ranks must know of it
        fault = f"DeepSpeed did not load {checkpoint}: {type(error).__name__}: {error}"
    fault = distributed.agree(fault)
    if fault:
        raise UserError(fault)


def _import_objects() -> dict[str, type]:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return dict(zip(OBJECTS, (LossScaler, ZeroStageEnum, fragment_address), strict=True))


def _require_names(content: Any, path: Path) -> None:
    """Refuse dictionary keys that are not plain names, because they become file names."""
    seen, waiting = {id(content)}, [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            for key in part:
                if isinstance(key, str) and (not NAME.fullmatch(key) or (key in FOREIGN_PARTS and part[key])):
                    raise UserError(f"{path} has an entry {escaped(key)!r}, so it was not read. {ADVICE}")
        inner = list(part.values()) if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
        for item in inner:
            if isinstance(item, dict | list | tuple) and id(item) not in seen:
                seen.add(id(item))
                waiting.append(item)
