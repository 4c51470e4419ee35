"""The options and the job of a training run, complete before torch is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds.data.lists.run_lists import Lists
from everest_ds.train.checkpoints.run_dir import Resume
from everest_ds.train.precision import PrecisionName


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How a run is started: its directory, sharding, precision and initial weights."""

    ds_config: Path | None = None
    """A file of ds_configs/, which decides how the run is sharded. Default: plain ZeRO-2."""
    out: Path | None = None
    """Run directory. Default: that of the checkpoint named by --resume, else runs/RECIPE."""
    resume: Annotated[str, tyro.conf.arg(metavar="{auto,never,PATH}")] = "auto"
    """auto: resume from the run directory's newest checkpoint; never: refuse a used directory; or a checkpoint."""
    init_from: Path | None = None
    """Start a new run from these weights, without optimiser states: a run, a checkpoint, an official .pth file, a
    Hugging Face folder, or a file of `everest convert`."""
    init_allow: tuple[str, ...] = ()
    """Names that may differ from --init-from and are then initialised afresh or ignored: tensors or modules
    (decoder, head.weight), positions, num_heads."""
    precision: PrecisionName = "auto"
    """auto: the DeepSpeed file's, else bf16 on a GPU and fp32 on a CPU. bf16: weights and gradients in bfloat16.
    autocast: weights and gradients in float32, matmuls in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A run whose lists have been read, and whose batch and directory have been checked.

    Attributes:
        lists: The lists, and the configuration with its number of classes.
        resume: The checkpoint to resume from, or the directory of a new run.
        options: How the run is started.
    """

    lists: Lists
    resume: Resume
    options: LaunchOptions
