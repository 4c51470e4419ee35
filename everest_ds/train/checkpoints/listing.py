"""What lies in RUN/checkpoints: complete checkpoints, unfinished saves, and whatever somebody else put there.

step-00001200/      a checkpoint, once it has a seal
    tmp-*/          a save, conversion or removal that has not finished; the next save removes it
    universal-*/    a checkpoint's copy for other worlds and ZeRO stages
    damaged-*/      a checkpoint that was passed over
    latest, best    pointers
    zero_to_*.py    scripts of DeepSpeed's

Everything else, and everything that has one of these names and is not that, is left alone: a copy of a checkpoint,
a link, a file. It is never resumed from, never counted and never removed.
"""

import re
from pathlib import Path
from typing import Any

from everest_ds.errors import UserError, escaped
from everest_ds.files import is_partial, parse_json
from everest_ds.train.checkpoints.seal import SEAL

STATE = "state.json"
# Version of the folder's layout and of state.json; raise it when an older reader would misread a newer folder.
FORMAT = 2
LATEST, BEST = "latest", "best"
_NAME = re.compile(r"step-(\d{8,})", re.ASCII)
_UNFINISHED = re.compile(r"tmp-(removed-)?(universal-)?step-\d{8,}", re.ASCII)
_KEPT = re.compile(r"(universal-step-\d{8,}|damaged-step-\d{8,}(\.\d+)?)", re.ASCII)
# DeepSpeed (0.19.8) puts these beside every checkpoint.
_SCRIPTS = frozenset({"zero_to_fp32.py", "zero_to_torch.py"})
_NUM_SHOWN = 4


def folder_of(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the folders that are sealed as checkpoints of a run, newest first, sound or not.

    Raises:
        UserError: The folder of checkpoints cannot be read.
    """
    return [path for path in _steps(run_dir) if _may_be_sealed(path)]


def sound_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run in which `find_outline_fault` finds none, newest first."""
    return [path for path in list_checkpoints(run_dir) if find_outline_fault(path) is None]


def unfinished_saves(run_dir: Path) -> list[Path]:
    """Return folders of saves that did not finish."""
    unsealed = [path for path in _steps(run_dir) if not _may_be_sealed(path)]
    return sorted([*unsealed, *leftovers(folder_of(run_dir))])


def leftovers(folder: Path) -> list[Path]:
    """Return what an unfinished save, conversion or removal left in a folder of checkpoints."""
    return [path for path in _entries(folder) if _UNFINISHED.fullmatch(path.name) and _is_plain_folder(path)]


def find_outline_fault(checkpoint: Path) -> str | None:
    """Return what keeps a sealed folder from being the checkpoint of its name, without reading its shards; or None.

    Its state must be of the step in its name, and its seal must name that state and a shard of every rank. What a
    newer version wrote is not judged: `read_state` refuses it.
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
        return f"{STATE} says that it is of step {step}"
    missing = [wanted for wanted in _outline(world_size, stage) if not sealed.intersection(wanted)]
    return f"{SEAL} does not name {missing[0][0]}" if missing else None


def describe_strangers(run_dir: Path) -> str | None:
    """Return what else lies among a run's checkpoints, in one sentence; None where there is nothing else."""
    folder = folder_of(run_dir)
    strangers = [text for text in map(_describe_stranger, _entries(folder)) if text is not None]
    if not strangers:
        return None
    shown = ", ".join(strangers[:_NUM_SHOWN]) + (" ..." if len(strangers) > _NUM_SHOWN else "")
    return f"{folder} holds what is no checkpoint of this run and is left alone: {shown}"


def _describe_stranger(path: Path) -> str | None:
    name = escaped(path.name)
    if is_partial(path) or path.name in _SCRIPTS:
        return None
    if path.name in (LATEST, BEST) and not path.is_symlink() and path.is_file():
        return None
    if not any(kind.fullmatch(path.name) for kind in (_NAME, _KEPT, _UNFINISHED)):
        return name
    if not _is_plain_folder(path):
        return f"{name} (a link)" if path.is_symlink() else f"{name} (no folder)"
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
            f"{folder} cannot be read: {error.strerror}; without it nobody knows where the run stands: mend that"
        ) from error


def _is_plain_folder(path: Path) -> bool:
    return not path.is_symlink() and path.is_dir()


def _may_be_sealed(folder: Path) -> bool:
    """Return whether a folder has a seal, or does not let itself be looked into."""
    try:
        return (folder / SEAL).is_file()
    except OSError:
        return True


def _outline(world_size: int, stage: int) -> list[tuple[str, ...]]:
    """Return which files a checkpoint must have; of each tuple one, named as DeepSpeed (0.19.8) names it."""
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
