"""The run directory: whether a run may use it, where it resumes from, and the files that describe the run.

RUN/config.json          the resolved recipe
    ds_config.json       the DeepSpeed configuration as used
    environment.json     command, commit, versions, hardware of the last launch
    owner.lock           the process that trains it; see `owner`
"""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from everest_ds import __version__, distributed
from everest_ds.config import Config
from everest_ds.config.file import dump_config, load_config
from everest_ds.data.lists.classes import NAMES_FILE, find_class_names
from everest_ds.errors import UserError, escaped
from everest_ds.files import is_partial, write_atomically, write_json
from everest_ds.train.checkpoints.listing import LATEST, folder_of, list_checkpoints, sound_checkpoints
from everest_ds.train.checkpoints.owner import OWNER, refuse_if_trained
from everest_ds.train.checkpoints.run_config import CONFIG, find_config_copy, find_config_fault
from everest_ds.train.checkpoints.save import read_pointer, read_state, require_pointer
from everest_ds.train.checkpoints.seal import SEAL, is_sealed
from everest_ds.train.record.lines import METRICS, read_measurements
from everest_ds.train.trackers.group import KNOWN_AS
from everest_ds.train.trackers.tensorboard import EVENT_FILES

# A network file system may show a new file to other nodes late (NFS: up to a minute by default).
VISIBLE_WITHIN_S = 90

# Files that a launch writes before its first step, besides config.json and the record.
_BEGUN_WITH = (
    "ds_config.json", "environment.json", "classes.txt", "tensorboard", "checkpoints", "media", "logs", "profile",
    "wandb", KNOWN_AS,
)  # fmt: skip

# Settings that may change when a run resumes, because they do not change results.
FREE_ON_RESUME = frozenset(
    {
        "batch.micro_size",
        "data.keep_decoded",
        "data.max_bad_share",
        "data.max_pixels",
        "data.num_workers",
        "data.prefetch_batches",
        "data.test_list",
        "data.timeout_s",
        "model.activation_checkpointing",
        "model.attention",
        "model.compile_blocks",
        "model.cuda_graph",
        "model.recompute_attention",
        "optim.gradients",
        "run.check_weights_every",
        "run.hang_after_s",
        "run.save_async",
        "run.keep_checkpoints",
        "run.keep_every_epochs",
        "run.log_every_steps",
        "run.log_to",
        "run.max_skipped_steps",
        "run.max_steps",
        "run.pictures_every_steps",
        "run.profile",
        "run.save_every_epochs",
        "run.save_every_steps",
        "run.validate_every_epochs",
        "views.num_spatial",
        "views.num_temporal",
    }
)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Where a run resumes from.

    Attributes:
        run_dir: The run directory.
        candidates: Complete checkpoints to try, in this order; empty for a fresh start.
        exact: Whether a checkpoint was named, so that no other may be used.
        note: A note for the user on the run directory, or None.
    """

    run_dir: Path
    candidates: tuple[Path, ...] = ()
    exact: bool = False
    note: str | None = None


def find_resume(out: Path | None, config: Config, resume: str) -> Resume:
    """Return where to resume from.

    Args:
        out: The run directory; None for that of the named checkpoint, or runs/RECIPE.
        config: The run.
        resume: auto, never, or the path of a checkpoint or run.

    Raises:
        UserError: The directory is being trained, is not empty although it should be, or has another run, or the
            named checkpoint cannot be used.
    """
    if resume not in ("auto", "never"):
        return _named_checkpoint(out, config, Path(resume))
    run_dir = out or Path("runs") / config.recipe
    refuse_if_trained(run_dir)
    if not _is_used(run_dir):
        return Resume(run_dir=run_dir)
    if resume == "never":
        raise UserError(f"--out {run_dir} is not empty and --resume is never; name another folder")
    candidates = list_checkpoints(run_dir)
    if not candidates and not (run_dir / CONFIG).is_file():
        raise UserError(f"--out {run_dir} is not empty and has no run (no config.json); name another folder")
    note = _require_same_run(run_dir, config)
    if not candidates:
        _require_unsaved(run_dir)
    return Resume(run_dir=run_dir, candidates=tuple(candidates), note=note)


def _named_checkpoint(out: Path | None, config: Config, named: Path) -> Resume:
    """Return the named checkpoint; a run directory, or its checkpoints/, means its `latest`."""
    for folder in (out,) if out else (named, *named.parents[:2]):
        refuse_if_trained(folder)
    if folder_of(named).is_dir():
        checkpoint = require_pointer(named, LATEST)
    elif named.is_dir() and folder_of(named.parent).resolve() == named.resolve():
        checkpoint = require_pointer(named.parent, LATEST)
    else:
        checkpoint = named
    if not is_sealed(checkpoint):
        raise UserError(
            f"--resume {named}: no complete checkpoint there; expected auto, never, a run directory, or a folder "
            f"RUN/checkpoints/step-... with {SEAL}"
        )
    source = checkpoint.parent.parent
    run_dir = out or source
    note = _require_same_run(source, config, checkpoint)
    if run_dir.resolve() != source.resolve():
        if _is_used(run_dir):
            raise UserError(f"--out {run_dir} holds another run than --resume {named}; name an empty folder")
    elif (newer := _newer_checkpoint(source, checkpoint)) is not None:
        raise UserError(
            f"--resume {named}: the run continued to {newer.name}; name another folder with --out to branch off"
        )
    return Resume(run_dir=run_dir, candidates=(checkpoint,), exact=True, note=note)


def _newer_checkpoint(run_dir: Path, checkpoint: Path) -> Path | None:
    """Return the newest sound checkpoint of a run if it is newer than another one, or that one is not the run's.

    A damaged checkpoint is newer than the sound ones before it: naming it must report the damage.
    """
    newest = next(iter(sound_checkpoints(run_dir)), None)
    for path in list_checkpoints(run_dir):  # newest first
        if path.resolve() == checkpoint.resolve():
            return None
        if path == newest:
            break
    return newest


def require_same_classes(resume: Resume, names: Sequence[str]) -> None:
    """Refuse to resume with other class names: in another order, the head's outputs would mean other classes.

    Args:
        resume: Where the run resumes from; nothing is compared for a fresh start, or if the run had no names.
        names: The class names, in the order of the labels.

    Raises:
        UserError: A name differs, or RUN/classes.txt cannot be read.
    """
    if not resume.candidates:
        return
    path = resume.candidates[0].parent.parent / NAMES_FILE
    accept = f"if the classes are the same, remove {path} and start again"
    try:
        stored = find_class_names(path.parent)
    except UserError as error:
        raise UserError(f"{error}; {accept}") from error
    places = enumerate(zip_longest(stored or names, names))
    changed = next(((place, was, now) for place, (was, now) in places if was != now), None)
    if changed is not None:
        place, was, now = changed
        raise UserError(
            f"class {place} was {escaped(repr(was))} and is now {escaped(repr(now))}, but the run's head has the "
            f"order of {path}; restore the names of the training list, or {accept}"
        )


def find_pointer_fault(run_dir: Path) -> str | None:
    """Return what is wrong with the pointer `latest` of a run that has checkpoints, or None."""
    if not list_checkpoints(run_dir):
        return None
    try:
        read_pointer(run_dir, LATEST)
    except UserError as error:
        return str(error)
    return None


def _is_used(run_dir: Path) -> bool:
    return run_dir.is_dir() and any(path.name != OWNER and not is_partial(path) for path in run_dir.iterdir())


def _require_unsaved(run_dir: Path) -> None:
    """Refuse a fresh start if the record says that checkpoints were saved: their disk may not be mounted."""
    lines = [line for line in read_measurements(run_dir) if line.get("event") in ("checkpoint", "resume")]
    step = max((line["step"] for line in lines), default=0)
    if step > 0:
        raise UserError(
            f"{run_dir / METRICS} says that step {step} was saved, but {folder_of(run_dir)} has no complete "
            f"checkpoint; mount or restore that folder to continue, or rename {METRICS} to start afresh"
        )


def _require_same_run(run_dir: Path, config: Config, checkpoint: Path | None = None) -> str | None:
    """Compare a run's settings with the given ones; return a note for the user if config.json is lost."""
    fault = find_config_fault(run_dir)
    if fault is None:
        _require_same_settings(run_dir, load_config(run_dir / CONFIG), config)
        return None
    checkpoints = sound_checkpoints(run_dir) if checkpoint is None else [checkpoint]
    copy = find_config_copy(checkpoints)
    if copy is not None:
        _require_same_settings(run_dir, load_config(copy), config)
        return f"{fault}; it is written again, after comparison with {copy}"
    if not checkpoints:
        _require_begun_only(run_dir, fault)
        return f"{fault}; it is written again, because the run has no checkpoint yet"
    state, global_size = read_state(checkpoints[0]), config.batch.global_size
    if state.samples != state.step * global_size:
        raise UserError(
            f"{fault}, and {checkpoints[0]} was trained with batch.global_size={state.samples / state.step:g}, now "
            f"{global_size}; give the settings of the run, or restore config.json"
        )
    return f"{fault}; it is written again with the settings of this command: check them, as there is no other copy"


def _require_begun_only(run_dir: Path, fault: str) -> None:
    """Refuse a folder whose config.json is lost, unless it has only files that a launch writes at its start."""
    known = {CONFIG, *_BEGUN_WITH, METRICS, OWNER}
    found = [path for path in run_dir.iterdir() if not (is_partial(path) or path.match(EVENT_FILES))]
    others = sorted(path.name for path in found if path.name not in known)
    if others:
        raise UserError(f"{fault}, and {run_dir} also has {escaped(others[0])}; name another folder with --out")


def _require_same_settings(run_dir: Path, was: Config, now: Config) -> None:
    stored, given = _flatten(was), _flatten(now)
    if stored["task"] != given["task"]:
        raise UserError(
            f"{run_dir} holds another run: its task is {stored['task']}, this one's {given['task']}; use another "
            f"--out{_way_to_start_from(run_dir)}"
        )
    changed = [key for key in stored if stored[key] != given[key] and key not in FREE_ON_RESUME]
    if changed:
        shown = ", ".join(f"{key} was {stored[key]!r} and is now {given[key]!r}" for key in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        is_same_model = not any(key.startswith("model.") for key in changed)
        raise UserError(
            f"{run_dir} holds another run: {shown}{more}; use the stored settings to continue it, or another --out"
            f"{_way_to_start_from(run_dir) if is_same_model else ''}"
        )


def _way_to_start_from(run_dir: Path) -> str:
    """Return the end of a message: how to start a new run from this one's weights."""
    if not list_checkpoints(run_dir):
        return ""
    source = shlex.quote(str(run_dir))
    return f". To train its weights further, start a new run: --init-from {source} --out ANOTHER"


def _flatten(config: Config) -> dict[str, Any]:
    """Return all settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in asdict(config).items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def write_run_files(run_dir: Path, config: Config, ds_config: dict[str, Any]) -> None:
    """Write the files that describe a run, at its start and when it resumes."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / CONFIG, dump_config(config))
    write_json(run_dir / "ds_config.json", ds_config)
    write_json(run_dir / "environment.json", describe_environment())


def require_shared(run_dir: Path) -> None:
    """Refuse a run directory in which a rank does not see the files of rank zero; all ranks take part."""
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while not (run_dir / "config.json").is_file() and time.monotonic() < deadline:
        time.sleep(1)
    seen = (run_dir / "config.json").is_file()
    fault = distributed.agree(None if seen else f"{platform.node()} does not see {run_dir}/config.json")
    if fault:
        raise UserError(f"{fault}; put the run directory on a file system that all nodes share")


def describe_environment() -> dict[str, Any]:
    """Return command, commit, versions and hardware of this process."""
    import torch

    versions: dict[str, str | None] = {"everest_ds": __version__, "python": platform.python_version()}
    for package in ("torch", "deepspeed", "timm", "av", "decord", "flash-attn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "versions": versions,
        "host": platform.node(),
        "cpu_count": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _commit() -> str | None:
    """Return the commit of a source checkout, marked if it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
