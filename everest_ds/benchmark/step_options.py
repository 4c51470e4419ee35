"""The options of `everest benchmark step`, and which of them go together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from everest_ds.config import Config, PretrainConfig
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.precision import PrecisionName

ReferenceName = Literal["everest", "videomae"]


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What to measure, and how."""

    micro_batch: Annotated[tuple[str, ...], tyro.conf.arg(metavar="{auto,N [N ...]}")] = ()
    """Clips a process takes at once: one or several numbers, or auto: 8, 16, 32 and so on until the GPU's memory is
    full. Without it, the recipe's batch.micro_size. Every micro-batch is an optimiser step (no accumulation)."""
    steps: int = 20
    """Timed steps of each micro-batch."""
    warmup: int = 5
    """Steps before them."""
    ds_config: Path | None = None
    """File of ds_configs/: how the steps are sharded. Without one, plain ZeRO-2."""
    precision: PrecisionName = "auto"
    """auto: as the DeepSpeed file says, else bf16 on a GPU and fp32 on a CPU. autocast: weights and gradients in
    float32, matrix products in bfloat16."""
    memory_gib: float | None = None
    """Measure as if the GPU had only so much memory."""
    compare: tuple[ReferenceName, ...] = ()
    """Forward and backward pass beside the official code in the folders EVEREST_REFERENCE_DIR and
    VIDEOMAE_REFERENCE_DIR, in turns; no DeepSpeed and no optimiser on either side."""
    sweep_stages: bool = False
    """Measure under every way of sharding of --stages, each in processes of its own, and write which is fastest."""
    stages: tuple[str, ...] = ("zero1", "zero2", "zero3")
    """Files of ds_configs/ that --sweep-stages measures, by name; zero3_offload only when it is asked for."""
    sweep_ratio: tuple[float, ...] = ()
    """Steps at these ratios of selected tokens, in turns, and how straight a line their times make. The visible
    tokens keep their share of the selected ones."""
    sweep_frames: tuple[int, ...] = ()
    """The same over clips of so many frames."""
    gpus: int | None = None
    """Processes that --sweep-stages starts; without it, one for each GPU of this machine, or one on a CPU."""
    out: Path | None = None
    """Where --sweep-stages writes; without it, runs/RECIPE-stages.json."""
    json: bool = False
    """One JSON line a micro-batch, or a sweep, instead of a table."""

    @property
    def modes(self) -> list[str]:
        """The flags given that ask for something else than steps over micro-batches."""
        asked = {
            "--compare": self.compare,
            "--sweep-stages": self.sweep_stages,
            "--sweep-ratio": self.sweep_ratio,
            "--sweep-frames": self.sweep_frames,
        }
        return [flag for flag, given in asked.items() if given]

    @property
    def of_run(self) -> dict[str, Any]:
        """What every line says of how it was measured."""
        return {"steps": self.steps, "warmup": self.warmup, "memory_gib": self.memory_gib}


@dataclass(frozen=True, kw_only=True)
class StepJob:
    """Steps that are to be measured.

    Attributes:
        config: The run.
        options: What is measured, and how.
        sizes: The micro-batches, in order; None for auto.
    """

    config: Config
    options: StepOptions
    sizes: tuple[int, ...] | None


def micro_sizes(config: Config, options: StepOptions) -> tuple[int, ...] | None:
    """Return the micro-batches to measure, in order; None for auto.

    Raises:
        UserError: One is no number of clips.
    """
    if options.micro_batch == ("auto",):
        return None
    if not options.micro_batch:
        return (config.batch.micro_size,)
    sizes = [int(word) if word.isdecimal() else 0 for word in options.micro_batch]
    if min(sizes) < 1:
        raise UserError(
            f"--micro-batch {' '.join(options.micro_batch)} must be auto, or numbers of clips of at least 1"
        )
    return tuple(sizes)


def require_consistent(config: Config, options: StepOptions, world: World) -> None:
    """Refuse options that cannot be, or that would have no effect together.

    Raises:
        UserError: Such options; names them and the way out.
    """
    for name, value, least in (("steps", options.steps, 1), ("warmup", options.warmup, 0)):
        if value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    if options.memory_gib is not None and not 0 < options.memory_gib < float("inf"):
        raise UserError(f"--memory-gib {options.memory_gib} must be a number of GiB above 0")
    if len(options.modes) > 1:
        raise UserError(f"{' and '.join(options.modes)} are measurements of their own; take them one by one")
    mode = options.modes[0] if options.modes else None
    if mode in ("--compare", "--sweep-stages") and options.ds_config is not None:
        raise UserError(
            f"{mode} with --ds-config {options.ds_config}: {mode} takes no DeepSpeed file; leave it out"
        )
    if mode and world.size > 1:
        raise UserError(f"{mode} is started without a launcher, got {world.size} processes")
    if options.compare and not isinstance(config, PretrainConfig):
        raise UserError(f"--compare: {config.recipe} is a fine-tuning; the comparison is of pre-training steps")
    of_sweep = {"gpus": options.gpus, "out": options.out}
    for name, given in of_sweep.items():
        if given is not None and not options.sweep_stages:
            raise UserError(f"--{name} {given} belongs to --sweep-stages; leave it out, or give that too")
    if options.gpus is not None and options.gpus < 1:
        raise UserError(f"--gpus {options.gpus} must be at least 1")
