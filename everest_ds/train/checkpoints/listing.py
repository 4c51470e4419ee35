"""Lists RUN/checkpoints: complete checkpoints, unfinished saves, and foreign entries.

step-00001200/      a checkpoint, once it has a seal
    tmp-*/          a save, conversion or removal that has not finished; the next save removes it
    universal-*/    a checkpoint's copy for another number of processes or ZeRO stage
    damaged-*/      a checkpoint that was skipped
    latest, best    pointers
    zero_to_*.py    DeepSpeed's scripts

Everything else is foreign, also an entry with one of these names that is something else, such as a link or a copy
of a checkpoint. Foreign entries are never resumed from, counted or removed.
"""

import re
from pathlib import Path
from typing import Any

from everest_ds.errors import UserError, escaped
from everest_ds.files import is_partial, parse_json
from everest_ds.train.checkpoints.seal import SEAL

STATE = "state.json"
# Version of the folder's layout and of state.json; increase it if an older version would misread a newer folder.
FORMAT = 2
LATEST, BEST = "latest", "best"
_NAME = re.compile(r"step-(\d{8,})", re.ASCII)
_UNFINISHED = re.compile(r"tmp-(removed-)?(universal-)?step-\d{8,}", re.ASCII)
_KEPT = re.compile(r"(universal-step-\d{8,}|damaged-step-\d{8,}(\.\d+)?)", re.ASCII)
# DeepSpeed (0.19.8) writes these next to every checkpoint.
_SCRIPTS = frozenset({"zero_to_fp32.py", "zero_to_torch.py"})
_NUM_SHOWN = 4


def folder_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the folders that are sealed as checkpoints of a run, newest first, without checking them.

    Raises:
        UserError: The folder of checkpoints cannot be read.
    """
    return [path for path in _steps(run_dir) if _may_be_sealed(path)]


def sound_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run in which `find_outline_fault` finds none, newest first."""
    return [path for path in list_checkpoints(run_dir) if find_outline_fault(path) is None]


def unfinished_saves(run_dir: Path) -> list[Path]:
    unsealed = [path for path in _steps(run_dir) if not _may_be_sealed(path)]
    return sorted([*unsealed, *leftovers(folder_of(run_dir))])


def leftovers(folder: Path) -> list[Path]:
    """Return the remains of unfinished saves, conversions and removals in a folder of checkpoints."""
    return [path for path in _entries(folder) if _UNFINISHED.fullmatch(path.name) and _is_plain_folder(path)]


def find_outline_fault(checkpoint: Path) -> str | None:
    """Return why a sealed folder is not the checkpoint of its name, without reading its shards; or None.

    Its state must have the step in its name, and its seal must name that state and a shard of every rank. A newer
    version's checkpoint is not checked; `read_state` refuses it.
    """
    name = STATE
    try:
        raw = parse_json((checkpoint / STATE).read_text(encoding="utf-8"))
        if _is_newer(raw.get("format")):
            return None
        step, world_size, stage = (_count(raw, key) for key in ("step", "world_size", "zero_stage"))
        if stage > 3:
            raise ValueError(f"there is no ZeRO stage {stage}")
        name = SEAL
        sealed = set(parse_json((checkpoint / SEAL).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name} cannot be read: {escaped(_reason(error))}"
    if checkpoint.name != f"step-{step:08d}":
        return f"its {STATE} is of step {step}"
    missing = [wanted for wanted in _outline(world_size, stage) if not sealed.intersection(wanted)]
    return f"{SEAL} does not name {missing[0][0]}" if missing else None


def describe_strangers(run_dir: Path) -> str | None:
    """Return a sentence on the foreign entries among a run's checkpoints; None if there are none."""
    folder = folder_of(run_dir)
    strangers = [text for text in map(_describe_stranger, _entries(folder)) if text is not None]
    if not strangers:
        return None
    shown = ", ".join(strangers[:_NUM_SHOWN]) + (" ..." if len(strangers) > _NUM_SHOWN else "")
    return f"{folder} has entries that are not checkpoints of this run and are left alone: {shown}"


def _describe_stranger(path: Path) -> str | None:
    name = escaped(path.name)
    if is_partial(path) or path.name in _SCRIPTS:
        return None
    if path.name in (LATEST, BEST) and not path.is_symlink() and path.is_file():
        return None
    if not any(kind.fullmatch(path.name) for kind in (_NAME, _KEPT, _UNFINISHED)):
        return name
    if not _is_plain_folder(path):
        return f"{name} (a link)" if path.is_symlink() else f"{name} (not a folder)"
    fault = find_outline_fault(path) if _NAME.fullmatch(path.name) and _may_be_sealed(path) else None
    return None if fault is None else f"{name} ({fault})"


def _steps(run_dir: Path) -> list[Path]:
    """Return the folders with names of checkpoints, the highest step first."""
    found = [path for path in _entries(folder_of(run_dir)) if _NAME.fullmatch(path.name) and _is_plain_folder(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read: {error.strerror}; make it readable, or name another folder with --out"
        ) from error


def _is_plain_folder(path: Path) -> bool:
    return not path.is_symlink() and path.is_dir()


def _may_be_sealed(folder: Path) -> bool:
    """Return whether a folder has a seal or cannot be read."""
    try:
        return (folder / SEAL).is_file()
    except OSError:
        return True


def _outline(world_size: int, stage: int) -> list[tuple[str, ...]]:
    """Return the files that a checkpoint must have, one of each tuple, with the names of DeepSpeed (0.19.8)."""
    ranks = range(world_size)
    wanted: list[tuple[str, ...]] = [(STATE,)]
    if stage == 3:
        wanted += [(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",) for rank in ranks]
    else:
        wanted.append(("mp_rank_00_model_states.pt",))
    if stage > 0:
        names = (f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks)
        wanted += [(name, f"bf16_{name}") for name in names]
    return wanted


def _count(raw: dict[str, Any], key: str) -> int:
    value = raw[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ValueError(f"{key}={value!r:.40}")
    return value


def _is_newer(version: object) -> bool:
    return isinstance(version, int) and version > FORMAT


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
