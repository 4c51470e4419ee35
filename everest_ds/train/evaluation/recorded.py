"""Scores that are recorded of a run's checkpoint, for people: what it reached in training, and its evaluations.

Place in the flow: a checkpoint -> lines of the model card (`everest convert --to hf`).
"""

import json
from pathlib import Path
from typing import Any, Literal

from everest_ds.config import FinetuneConfig
from everest_ds.config_file import load_config
from everest_ds.counts import describe_kept
from everest_ds.geometry import TokenGrid
from everest_ds.train.checkpoint import AVERAGE, read_state
from everest_ds.train.evaluation.files import SUMMARY

WeightsKind = Literal["model", "ema"]


def recorded_scores(checkpoint: Path, kind: WeightsKind) -> tuple[str, ...]:
    """Return the scores of a checkpoint's weights, or of their moving average, a line each.

    None where nothing was scored. Evaluations of other weights are left out, and so are files that are not an
    evaluation's summary.
    """
    run_dir, state = checkpoint.parent.parent, read_state(checkpoint)
    config = load_config(run_dir / "config.json")
    lines = []
    if not isinstance(config, FinetuneConfig):
        return ()
    # Training scores the average where one is kept.
    is_scored = kind == ("ema" if (checkpoint / AVERAGE).is_file() else "model")
    if is_scored and state.best_score is not None and state.best_step == state.step:
        videos = Path(config.data.val_list or "").name
        lines.append(f"top-1 {state.best_score:.2%} on {videos}, one view in the middle of each video")
    for path in sorted(run_dir.glob(f"evaluation-*/{SUMMARY}")):
        try:
            line = _line_of(json.loads(path.read_text(encoding="utf-8")), (checkpoint.name, kind), config)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if line is not None:
            lines.append(line)
    return tuple(lines)


def _line_of(summary: dict[str, Any], wanted: tuple[str, str], config: FinetuneConfig) -> str | None:
    """Return a summary's scores in words; None where it is of other weights or of frozen features."""
    of, views = summary["checkpoint"], summary["views"]
    if (of["name"], of["weights"]) != wanted or summary["protocol"]["name"] != "head":
        return None
    grid = TokenGrid.of_clip(
        num_frames=views["num_frames"],
        height=views["image_size"],
        width=views["image_size"],
        tubelet_size=config.model.tubelet_size,
        patch_size=config.model.patch_size,
    )
    kept = describe_kept(views["selection"]["keep_ratio"], views["tokens_kept"], grid.num_tokens)
    videos = Path(summary["list"]["path"]).name
    top5 = "" if summary["top5"] is None else f", top-5 {summary['top5']:.2%}"
    return (
        f"top-1 {summary['top1']:.2%}{top5} on {summary['num_scored']} videos of {videos}, "
        f"{views['num_temporal']} x {views['num_spatial']} views; the model {kept}"
    )
