"""From a run to its trackers: what they show of it at its start."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from everest_ds.config import Config
from everest_ds.config.file import dump_config
from everest_ds.console.messages import say
from everest_ds.train.trackers.base import TrackedRun, flat_settings
from everest_ds.train.trackers.group import Trackers
from everest_ds.train.trackers.tensorboard import viewing_command


def show_run(trackers: Trackers, run_dir: Path, config: Config, ds_config: dict[str, Any], start_step: int) -> None:
    """Open a run's trackers with its recipe and DeepSpeed file, and say how the run is looked at.

    Raises:
        UserError: One cannot be opened.
    """
    run = TrackedRun(run_dir=run_dir, settings=flat_settings(asdict(config)), start_step=start_step)
    trackers.open(run, {"recipe": dump_config(config), "ds_config": json.dumps(ds_config, indent=2)})
    if "tensorboard" in config.run.log_to:
        say(f"watch it: {shlex.join(viewing_command(run_dir))}")
