"""The work of `everest convert`: writes weights in another layout and reports what was read and written."""

from pathlib import Path

from everest_ds.console.messages import say
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.inference.job import ConversionJob
from everest_ds.inference.results import recorded_scores
from everest_ds.model.weights.export import require_target, write_weights
from everest_ds.model.weights.reading import require_complete
from everest_ds.train.checkpoints.consolidated import export_fp32, read_any_weights
from everest_ds.train.checkpoints.save import AVERAGE
from everest_ds.train.ema import averaged


def run(job: ConversionJob, world: World) -> int:
    """Write weights in a layout, print what was read and which key became which, and return 0.

    Raises:
        UserError: The source's weights are damaged or incomplete, the target cannot be written, or an option has
            no effect.
    """
    source, target, options = job.source, job.target, job.options
    if options.to == "deepspeed-fp32":
        read = export_fp32(source, target)
        say(f"float32 weights of {read} -> {target} ({_mebibytes(target):.1f} MiB)")
        return 0
    require_target(target, options.to)
    weights = read_any_weights(source)
    checkpoint = weights.checkpoint
    if options.weights == "ema":
        if checkpoint is None:
            raise UserError(f"--weights ema: only runs and checkpoints have an average; {source} is neither")
        weights = averaged(weights, checkpoint)
    weights, report = require_complete(weights, options.allow)
    scores = recorded_scores(checkpoint, options.weights) if checkpoint else ()
    written = write_weights(weights, target, options.to, recipe=job.recipe, scores=scores)
    say(report.describe())
    if options.weights == "model" and checkpoint is not None and (checkpoint / AVERAGE).is_file():
        say("  note          `everest evaluate` scores the run's moving average; --weights ema writes that one")
    for note in written.notes:
        say(f"  note          {note}")
    width = max(len(there) for there, _ in written.key_map)
    for there, name in written.key_map:
        say(f"    {there:<{width}}  {'as it was' if there == name else name}")
    say(f"{options.to} layout -> {target} ({_mebibytes(target):.1f} MiB)")
    return 0


def _mebibytes(target: Path) -> float:
    files = [target] if target.is_file() else list(target.iterdir())
    return sum(file.stat().st_size for file in files) / 2**20
