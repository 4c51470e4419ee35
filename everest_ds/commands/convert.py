"""`everest convert`: weights of a run or of another project, in another project's layout."""

from pathlib import Path
from typing import Literal

from everest_ds import distributed
from everest_ds.errors import UserError
from everest_ds.recipes import find_config

Target = Literal["everest", "videomae", "hf", "deepspeed-fp32"]


def convert(source: Path, target: Path, to: Target, allow: tuple[str, ...] = (), recipe: str | None = None) -> None:
    """Write weights in a layout; print what was read, the key map, and where it went.

    Args:
        source: A run or checkpoint; for all but deepspeed-fp32 also any file or folder of weights.
        target: What to write; it must not exist.
        to: everest, videomae, hf, or deepspeed-fp32: a run's weights with its step and configuration.
        allow: Names that may be in the source and are left out.
        recipe: Of hf: recipe or config.json that says how clips are cut and which tokens are kept, for weights that
            come without a run.

    Raises:
        UserError: The source holds no sound and complete weights, the target cannot be written, or an option has no
            effect.
    """
    if recipe is not None and to != "hf":
        raise UserError(f"--recipe {recipe} has no effect with --to {to}; remove it")
    config = find_config(recipe) if recipe else None
    distributed.select_accelerator()
    from everest_ds.train.consolidated import export_fp32, read_any_weights

    if to == "deepspeed-fp32":
        if allow:
            raise UserError(f"--allow {' '.join(allow)} has no effect with --to deepspeed-fp32; remove it")
        checkpoint = export_fp32(source, target)
        print(f"float32 weights of {checkpoint} -> {target} ({_mebibytes(target):.1f} MiB)")
        return
    from everest_ds.model.weights.export import require_target, write_weights
    from everest_ds.model.weights.reading import require_complete
    from everest_ds.train.evaluation.recorded import recorded_scores

    require_target(target, to)
    weights, report = require_complete(read_any_weights(source), allow)
    scores = recorded_scores(weights.checkpoint) if weights.checkpoint else ()
    written = write_weights(weights, target, to, recipe=config, scores=scores)
    print(report.describe())
    for note in written.notes:
        print(f"  note          {note}")
    width = max(len(there) for there, _ in written.key_map)
    for there, name in written.key_map:
        print(f"    {there:<{width}}  {'as it was' if there == name else name}")
    print(f"{to} layout -> {target} ({_mebibytes(target):.1f} MiB)")


def _mebibytes(target: Path) -> float:
    files = [target] if target.is_file() else list(target.iterdir())
    return sum(file.stat().st_size for file in files) / 2**20
