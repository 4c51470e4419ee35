"""Read EVALUATION/summary.json of `everest evaluate` for a report: needs no torch and tolerates damaged files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everest_ds.errors import UserError
from everest_ds.files import read_json_object
from everest_ds.pictures.report.contents import ReportedRun, ScoredList
from everest_ds.train.record.stored.texts import flat_texts, number_of, text_of

SUMMARY, ENVIRONMENT = "summary.json", "environment.json"
_MOST_CLASSES = 4096


def read_evaluations(run_dir: Path) -> tuple[list[ScoredList], list[str]]:
    """Return the evaluations in a run directory, and a message for each one that cannot be read."""
    scores, faults = [], []
    for path in sorted(path for path in run_dir.glob(f"evaluation-*/{SUMMARY}") if path.is_file()):
        try:
            scores.append(read_scores(path.parent))
        except UserError as error:
            faults.append(str(error))
    return scores, faults


def read_scores(folder: Path) -> ScoredList:
    """Read an evaluation's summary.

    Raises:
        UserError: The file is missing or is not the summary of an evaluation.
    """
    path = folder / SUMMARY
    summary = read_json_object(path)
    parts = {name: summary.get(name) for name in ("protocol", "checkpoint", "list", "views")}
    if not all(isinstance(part, dict) for part in parts.values()) or math.isnan(number_of(summary.get("top1"))):
        raise UserError(f"{path} is not the summary of an evaluation")
    protocol, checkpoint, videos, views = (part or {} for part in parts.values())
    kept = views.get("selection")
    facts = {
        "list": text_of(videos.get("path")),
        "weights": f"{text_of(checkpoint.get('name'))}, {text_of(checkpoint.get('weights'))}",
        "protocol": text_of(protocol.get("name")),
        "views": f"{text_of(views.get('num_temporal'))} x {text_of(views.get('num_spatial'))}",
        "keep ratio": text_of(kept.get("keep_ratio")) if isinstance(kept, dict) else "",
        "top-1": _percent(summary.get("top1")),
        "top-5": _percent(summary.get("top5")),
        "mean class": _percent(summary.get("mean_class_accuracy")),
        "loss": "" if summary.get("loss") is None else f"{number_of(summary.get('loss')):.4f}",
        "videos": text_of(summary.get("num_scored")),
    }
    confusion = _sound_confusion(summary.get("confusion"))
    names = summary.get("classes")
    has_names = isinstance(names, list) and confusion is not None and len(names) == len(confusion)
    return ScoredList(
        name=folder.name,
        facts=facts,
        class_names=list(map(text_of, names or ())) if has_names else list(map(str, range(len(confusion or ())))),
        confusion=confusion,
        unreadable=_describe_unreadable(summary),
    )


def read_evaluation(folder: Path) -> ReportedRun:
    """Read an evaluation's folder as an entry of its own in a report.

    Raises:
        UserError: See `read_scores`.
    """
    scores = read_scores(folder)
    summary = read_json_object(folder / SUMMARY)
    described = ("protocol", "checkpoint", "list", "views", "precision", "attention", "batch_rows")
    environment: Mapping[str, Any] = {}
    notes = []
    if (folder / ENVIRONMENT).is_file():
        try:
            environment = read_json_object(folder / ENVIRONMENT)
        except UserError as error:
            notes.append(str(error))
    return ReportedRun(
        path=folder,
        state="evaluation",
        facts={"state": f"evaluation of {scores.facts['weights']} on {scores.facts['list']}"},
        settings=flat_texts({name: summary[name] for name in described if name in summary}),
        environment=flat_texts(environment),
        scores=[scores],
        notes=notes,
    )


def _percent(value: Any) -> str:
    number = number_of(value)
    return f"{number:.2%}" if number == number else ""


def _sound_confusion(value: Any) -> Sequence[Sequence[int]] | None:
    """Return a value that is a square matrix of counts; None for anything else."""
    if not isinstance(value, list) or not 0 < len(value) <= _MOST_CLASSES:
        return None
    rows = [row for row in value if isinstance(row, list) and len(row) == len(value)]
    are_counts = all(type(count) is int and 0 <= count < 2**53 for row in rows for count in row)
    return rows if len(rows) == len(value) and are_counts else None


def _describe_unreadable(summary: Mapping[str, Any]) -> str:
    bad = summary.get("unreadable")
    if not isinstance(bad, list) or not bad:
        return ""
    first = bad[0] if isinstance(bad[0], dict) else {}
    return f"{len(bad)} unreadable; the first is {text_of(first.get('path'))}: {text_of(first.get('reason'))}"
