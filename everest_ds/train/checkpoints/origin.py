"""Finds what a path names: a run, a checkpoint of a run, or weights. Importing this module needs no torch."""

from dataclasses import dataclass
from pathlib import Path

from everest_ds.config import Config
from everest_ds.errors import UserError
from everest_ds.train.checkpoints.listing import find_outline_fault, folder_of, list_checkpoints, sound_checkpoints
from everest_ds.train.checkpoints.run_config import CONFIG, read_config
from everest_ds.train.checkpoints.save import find_best
from everest_ds.train.checkpoints.seal import SEAL, is_sealed


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The origin of weights.

    Attributes:
        given: The path as it was given.
        weights: The checkpoint's folder, or the file or folder of weights.
        run_dir: The run that the checkpoint belongs to; None for other weights.
        config: The run's configuration.
        choice: Which of the run's checkpoints this is, in words.
    """

    given: Path
    weights: Path
    run_dir: Path | None = None
    config: Config | None = None
    choice: str = "as given"


def locate(path: Path) -> Origin:
    """Return what a path names. A run means its best checkpoint if it has one, else its newest.

    The files of a checkpoint are not compared with its seal.

    Raises:
        UserError: The path does not exist, or has no complete checkpoint.
    """
    if folder_of(path).is_dir():
        complete = sound_checkpoints(path)
        config = read_config(path, complete)
        best = find_best(path)
        if best is not None:
            return Origin(given=path, weights=best, run_dir=path, config=config, choice="the best")
        if not complete:
            faults = [f"{folder.name}: {find_outline_fault(folder)}" for folder in list_checkpoints(path)]
            raise UserError(": ".join([f"{path} has no complete checkpoint", *faults[:1]]))
        return Origin(given=path, weights=complete[0], run_dir=path, config=config, choice="the newest")
    if not path.exists():
        raise UserError(
            f"{path} does not exist; expected a run directory, a checkpoint, a .pth, .pt or .safetensors file, or "
            "a Hugging Face folder"
        )
    run_dir = path.parent.parent
    in_run = path.parent.name == folder_of(run_dir).name and (run_dir / CONFIG).is_file()
    if not in_run and not is_sealed(path):
        return Origin(given=path, weights=path)
    if not is_sealed(path):
        raise UserError(f"{path} is neither a run directory nor a complete checkpoint: it has no {SEAL}")
    return Origin(given=path, weights=path, run_dir=run_dir, config=read_config(run_dir, [path]))
