"""Output of an evaluation, and the recorded scores of a checkpoint.

Place in the flow: Scores -> summary.json, predictions.csv and a table; a checkpoint -> lines of the model card
(`everest convert --to hf`).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from everest_ds.config import FinetuneConfig
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.errors import UserError, escaped
from everest_ds.files import read_json_object, write_csv
from everest_ds.inference.scores import Scores
from everest_ds.inference.source import ClipSettings
from everest_ds.tokens import TokenGrid, describe_kept
from everest_ds.train.checkpoints.run_config import read_config
from everest_ds.train.checkpoints.save import AVERAGE, read_state
from everest_ds.train.record.stored.evaluations import SUMMARY

COLUMNS = (
    "row", "path", "label", "label_name", "predicted", "predicted_name", "probability", "top5",
    "top5_probabilities", "correct", "readable",
)  # fmt: skip
_NUM_LISTED = 5


def view_recipe(settings: ClipSettings, num_kept: int) -> dict[str, Any]:
    """Return all settings that determine which pixels the model sees."""
    data, views = settings.data, settings.views
    counts_frames = data.sampling == "dense" and data.sampling_seconds is None
    # Named only if it is used, so that evaluations of older versions compare equal.
    in_time = {} if data.sampling_seconds is None else {"sampling_seconds": data.sampling_seconds}
    return {
        "num_frames": data.num_frames,
        "sampling": data.sampling,
        "sampling_stride": data.sampling_stride if counts_frames else None,
        **in_time,
        "image_size": data.image_size,
        "num_temporal": views.num_temporal,
        "num_spatial": views.num_spatial,
        "selection": asdict(settings.selection),
        "tokens_kept": num_kept,
    }


def require_own(out: Path, summary: dict[str, Any]) -> None:
    """Refuse a folder with another evaluation; the same evaluation may be repeated.

    Raises:
        UserError: The folder has another evaluation, or its summary was not written by `everest evaluate`.
    """
    path = out / SUMMARY
    if not path.is_file():
        return
    try:
        earlier = _identity(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} was not written by `everest evaluate`; name another folder with --out") from error
    now = _identity(summary)
    for key, value in now.items():
        if earlier[key] != value:
            raise UserError(
                f"{out} contains an evaluation with another {key} ({json.dumps(earlier[key])}, now "
                f"{json.dumps(value)}); name another folder with --out, or remove this one"
            )


def _identity(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that must be equal for an evaluation to replace an earlier one; they contain no paths."""
    return {
        "protocol": summary["protocol"],
        "checkpoint": {key: summary["checkpoint"][key] for key in ("name", "weights", "sha256")},
        "list": summary["list"]["videos"],
        "view recipe": summary["views"],
    }


def score_summary(scores: Scores, class_names: Sequence[str], num_rows: int) -> dict[str, Any]:
    """Return the scores as fields of the summary; shares are in [0, 1], undefined values are null.

    The loss has six digits: the number of threads may change later ones.
    """
    return {
        "top1": scores.top1,
        "top5": scores.top5,
        "loss": round(scores.loss, 6) if math.isfinite(scores.loss) else None,
        "mean_class_accuracy": scores.mean_class_accuracy,
        "num_rows": num_rows,
        "num_scored": scores.num_scored,
        "num_unreadable": len(scores.unreadable),
        "unreadable": [{"row": bad.row, "path": bad.path, "reason": bad.reason} for bad in scores.unreadable],
        "per_class": [
            {"name": name, "count": entry.count, "correct": entry.correct, "accuracy": entry.accuracy}
            for name, entry in zip(class_names, scores.per_class, strict=True)
        ],
        "confusion": [list(counts) for counts in scores.confusion],
    }


def write_predictions(scores: Scores, rows: Sequence[VideoRow], class_names: Sequence[str], path: Path) -> None:
    """Write one line for each row of the list, also for unreadable ones.

    Probabilities have six digits: the number of threads may change later ones.
    """
    by_row = {prediction.row: prediction for prediction in scores.predictions}
    lines: list[list[object]] = []
    for i, row in enumerate(rows):
        start = [i, str(row.path), row.label, class_names[row.label]]
        if i not in by_row:
            lines.append([*start, *[""] * 6, "false"])
            continue
        prediction = by_row[i]
        ranking, predicted = prediction.ranking, prediction.predicted
        shown = [f"{probability:.6f}" for probability in ranking.probabilities[:5]]
        classes = " ".join(str(k) for k in ranking.classes[:5])
        values = [predicted, class_names[predicted], shown[0], classes, " ".join(shown)]
        lines.append([*start, *values, "true" if prediction.is_correct else "false", "true"])
    write_csv(path, COLUMNS, lines)


def table(scores: Scores, class_names: Sequence[str], kept: str | None = None) -> str:
    """Return the scores as text: in percent, with the worst classes.

    Args:
        scores: The scores.
        class_names: A name for each class.
        kept: A text about how many tokens of a clip the model keeps, or None.
    """
    lines = [f"top-1  {scores.top1:7.2%}"]
    if scores.top5 is not None:
        lines.append(f"top-5  {scores.top5:7.2%}")
    lines.append(f"mean class accuracy {scores.mean_class_accuracy:.2%} over {scores.num_scored} videos")
    if math.isfinite(scores.loss):
        lines[-1] += f", loss {scores.loss:.4f}"
    if kept is not None:
        lines[-1] += f"; the model {kept}"
    present = [(entry.accuracy, k) for k, entry in enumerate(scores.per_class) if entry.accuracy is not None]
    worst = sorted(present)[: min(_NUM_LISTED, len(present) - 1)]
    if worst:
        lines.append("worst classes:")
    for accuracy, k in worst:
        entry = scores.per_class[k]
        mistaken = [(count, -j) for j, count in enumerate(scores.confusion[k]) if count and j != k]
        taken_for = f", most often taken for {class_names[-max(mistaken)[1]]}" if mistaken else ""
        lines.append(escaped(f"  {accuracy:7.2%}  {class_names[k]} ({entry.correct} of {entry.count}){taken_for}"))
    if scores.unreadable:
        bad = scores.unreadable
        lines.append(f"NOT SCORED: {len(bad)} unreadable, the first is {bad[0].path}: {bad[0].reason}")
    return "\n".join(lines)


WeightsKind = Literal["model", "ema"]


def recorded_scores(checkpoint: Path, kind: WeightsKind) -> tuple[str, ...]:
    """Return the scores of a checkpoint's weights, or of their moving average, as lines; empty without scores.

    Evaluations of other weights, and files that are not an evaluation's summary, are left out.
    """
    run_dir, state = checkpoint.parent.parent, read_state(checkpoint)
    config = read_config(run_dir, [checkpoint])
    lines = []
    if not isinstance(config, FinetuneConfig):
        return ()
    # Training scores the average if there is one.
    is_scored = kind == ("ema" if (checkpoint / AVERAGE).is_file() else "model")
    if is_scored and state.best_score is not None and state.best_step == state.step:
        videos = Path(config.data.val_list or "").name
        lines.append(f"top-1 {state.best_score:.2%} on {videos}, one view in the middle of each video")
    for path in sorted(run_dir.glob(f"evaluation-*/{SUMMARY}")):
        try:
            line = _line_of(read_json_object(path), (checkpoint.name, kind), config)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if line is not None:
            lines.append(line)
    return tuple(lines)


def _line_of(summary: dict[str, Any], wanted: tuple[str, str], config: FinetuneConfig) -> str | None:
    """Return a summary's scores as text; None if it is of other weights or of frozen features."""
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
