"""What a training run is started with, known before torch is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds.data.lists.run_lists import Lists
from everest_ds.train.checkpoints.run_dir import Resume
from everest_ds.train.precision import PrecisionName


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How a run is started: where, how sharded, in which precision."""

    ds_config: Path | None = None
    """File of ds_configs/: how the run is sharded. Without one, plain ZeRO-2."""
    out: Path | None = None
    """Run directory; without one, that of the checkpoint named by --resume, or runs/RECIPE."""
    resume: Annotated[str, tyro.conf.arg(metavar="{auto,never,PATH}")] = "auto"
    """auto: resume from the run directory's newest checkpoint; never: refuse a used directory; or a checkpoint."""
    init_from: Path | None = None
    """Start a new run from these weights and nothing else: a run, a checkpoint, an official .pth file, a Hugging
    Face folder, or a file of `everest convert`."""
    init_allow: tuple[str, ...] = ()
    """What of --init-from may be left fresh or ignored, by name: tensors or modules (decoder, head.weight),
    positions, num_heads."""
    precision: PrecisionName = "auto"
    """auto: as the DeepSpeed file says, else bf16 on a GPU and fp32 on a CPU. bf16: weights and gradients in
    bfloat16; autocast: these in float32, and matmuls in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A run whose lists are read, whose batch can be made, and whose directory may be used.

    Attributes:
        lists: Its lists, with the configuration, its classes counted.
        resume: Where it resumes, or which directory it begins.
        options: How it is started.
    """

    lists: Lists
    resume: Resume
    options: LaunchOptions
