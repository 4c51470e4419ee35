"""Reads a run's configuration: RUN/config.json, or if that is lost, the copy in a checkpoint; without torch."""

from collections.abc import Sequence
from pathlib import Path

from everest_ds.config import Config
from everest_ds.config.file import load_config
from everest_ds.errors import UserError
from everest_ds.files import read_json_object

CONFIG = "config.json"


def find_config_fault(folder: Path) -> str | None:
    """Return why the config.json of a run or checkpoint is lost (missing, empty or truncated), or None."""
    try:
        read_json_object(folder / CONFIG)
    except UserError as error:
        return str(error)
    return None


def find_config_copy(checkpoints: Sequence[Path]) -> Path | None:
    """Return the first copy of the configuration in checkpoints, or None; older versions wrote none."""
    return next((one / CONFIG for one in checkpoints if find_config_fault(one) is None), None)


def read_config(run_dir: Path, checkpoints: Sequence[Path]) -> Config:
    """Return a run's configuration.

    Args:
        run_dir: The run directory.
        checkpoints: Checkpoints whose copy may be used instead, in this order.

    Raises:
        UserError: It is lost and there is no copy, or `load_config` refuses it.
    """
    copy = None if find_config_fault(run_dir) is None else find_config_copy(checkpoints)
    return load_config(copy or run_dir / CONFIG)
