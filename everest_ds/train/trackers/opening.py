"""Opens the trackers of a run."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from everest_ds.config import Config
from everest_ds.config.file import dump_config
from everest_ds.console.messages import say
from everest_ds.train.trackers.base import TrackedRun, compared_settings, flat_settings
from everest_ds.train.trackers.group import Trackers
from everest_ds.train.trackers.tensorboard import viewing_command


def show_run(
    trackers: Trackers,
    run_dir: Path,
    config: Config,
    ds_config: dict[str, Any],
    *,
    start_step: int,
    recipe: Config | None,
    precision: str,
) -> None:
    """Open a run's trackers, show its settings and DeepSpeed file there, and print how to watch the run.

    Args:
        trackers: The trackers to open.
        run_dir: The run directory.
        config: The run's configuration.
        ds_config: The resolved DeepSpeed configuration.
        start_step: Number of steps before this start.
        recipe: The unchanged recipe; None if this version has no recipe of that name.
        precision: Name of the run's precision.

    Raises:
        UserError: One cannot be opened.
    """
    settings = flat_settings(asdict(config))
    of_recipe = None if recipe is None else flat_settings(asdict(recipe))
    compared = compared_settings(settings, of_recipe, precision)
    run = TrackedRun(run_dir=run_dir, settings=settings, compared=compared, start_step=start_step)
    trackers.open(run, {"recipe": dump_config(config), "ds_config": json.dumps(ds_config, indent=2)})
    if "tensorboard" in config.run.log_to:
        say(f"watch it: {shlex.join(viewing_command(run_dir))}")
