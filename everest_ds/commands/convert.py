"""`everest convert`: weights of a run or of another project, in another project's layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from everest_ds import distributed
from everest_ds.errors import UserError
from everest_ds.recipes import find_config

Target = Literal["everest", "videomae", "hf", "deepspeed-fp32"]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What is written, and what of the source."""

    to: Target
    """everest: a float32 .safetensors file; videomae: a .pth file in the official layout; hf: a Hugging Face
    folder; deepspeed-fp32: everest with a run's step and configuration."""
    allow: tuple[str, ...] = ()
    """Tensors or modules that may be in SRC and are left out."""
    weights: Literal["model", "ema"] = "model"
    """ema: the moving average that a run keeps (optim.ema_decay), which `everest evaluate` scores."""
    recipe: str | None = None
    """With --to hf: recipe, or config.json, that says how clips are cut and which tokens a classifier keeps, for
    weights that come without a run."""

    def __post_init__(self) -> None:
        """Refuse options that have no effect."""
        if self.recipe is not None and self.to != "hf":
            raise UserError(f"--recipe {self.recipe} has no effect with --to {self.to}; remove it")
        if self.to != "deepspeed-fp32":
            return
        if self.allow:
            raise UserError(f"--allow {' '.join(self.allow)} has no effect with --to deepspeed-fp32; remove it")
        if self.weights != "model":
            raise UserError("--weights ema cannot be written with --to deepspeed-fp32; use --to everest")


def convert(source: Path, target: Path, options: ConvertOptions) -> None:
    """Write weights in a layout; print what was read, the key map, and where it went.

    Args:
        source: A run or checkpoint; for all but deepspeed-fp32 also any file or folder of weights.
        target: What to write; it must not exist.
        options: The layout, and what of the source.

    Raises:
        UserError: The source holds no sound and complete weights, the target cannot be written, or an option has no
            effect.
    """
    recipe = find_config(options.recipe) if options.recipe else None
    distributed.select_accelerator()
    from everest_ds.train.checkpoints.consolidated import export_fp32, read_any_weights

    if options.to == "deepspeed-fp32":
        read = export_fp32(source, target)
        print(f"float32 weights of {read} -> {target} ({_mebibytes(target):.1f} MiB)")
        return
    from everest_ds.inference.results import recorded_scores
    from everest_ds.model.weights.export import require_target, write_weights
    from everest_ds.model.weights.reading import require_complete
    from everest_ds.train.checkpoints.save import AVERAGE
    from everest_ds.train.ema import averaged

    require_target(target, options.to)
    weights = read_any_weights(source)
    checkpoint = weights.checkpoint
    if options.weights == "ema":
        if checkpoint is None:
            raise UserError(f"--weights ema: {source} is neither a run nor a checkpoint, which keep an average")
        weights = averaged(weights, checkpoint)
    weights, report = require_complete(weights, options.allow)
    scores = recorded_scores(checkpoint, options.weights) if checkpoint else ()
    written = write_weights(weights, target, options.to, recipe=recipe, scores=scores)
    print(report.describe())
    if options.weights == "model" and checkpoint is not None and (checkpoint / AVERAGE).is_file():
        print("  note          `everest evaluate` scores the run's moving average; --weights ema writes that one")
    for note in written.notes:
        print(f"  note          {note}")
    width = max(len(there) for there, _ in written.key_map)
    for there, name in written.key_map:
        print(f"    {there:<{width}}  {'as it was' if there == name else name}")
    print(f"{options.to} layout -> {target} ({_mebibytes(target):.1f} MiB)")


def _mebibytes(target: Path) -> float:
    files = [target] if target.is_file() else list(target.iterdir())
    return sum(file.stat().st_size for file in files) / 2**20
