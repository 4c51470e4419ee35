"""The work of `everest predict`: prints the likeliest classes of videos, or writes their features."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.console.messages import say
from everest_ds.distributed import World
from everest_ds.errors import UserError, escaped
from everest_ds.inference.job import PredictionJob
from everest_ds.inference.passes import Passes, UnreadableRow
from everest_ds.inference.results import view_recipe
from everest_ds.inference.scores import rank_rows
from everest_ds.inference.showing import draw_seen
from everest_ds.inference.source import identify, weights_kind
from everest_ds.inference.trained import Trained, load_trained
from everest_ds.model.weights.export import save_safetensors, write_whole

EXIT_UNREADABLE = 2


def run(job: PredictionJob, world: World) -> int:
    """Print the likeliest classes of videos, or write their features.

    Returns:
        The exit code: 2 if no video could be read, or if one could not and this is not allowed; otherwise 0. The
        readable videos are done in any case.

    Raises:
        UserError: The weights cannot be used.
    """
    options, rows = job.options, job.rows
    on_gpu = distributed.select_accelerator()
    trained = load_trained(job.origin, job.settings, options, torch.device("cuda" if on_gpu else "cpu"))
    if options.features is None and not trained.has_head:
        raise UserError(
            "these weights have no classification head; fine-tune them, or write features with --features FILE"
        )
    passes = replace(trained.start(options, world), allow_unreadable=True)
    if world.is_main and not options.json:
        say(f"{trained.report}\nthe model {trained.kept}")
    unreadable = _labels(job, trained, passes) if options.features is None else _features(job, trained, passes)
    if world.is_main and not options.json:
        for bad in unreadable:
            print(escaped(f"cannot read {rows[bad.row].name}: {bad.reason}"), file=sys.stderr, flush=True)
    distributed.finish()
    return EXIT_UNREADABLE if len(unreadable) > (len(rows) - 1 if options.allow_unreadable else 0) else 0


def _labels(job: PredictionJob, trained: Trained, passes: Passes) -> tuple[UnreadableRow, ...]:
    """Print the likeliest classes of each video: a table, or JSON lines."""
    options, names = job.options, trained.class_names
    outputs = rank_rows(
        trained.wrap(trained.model),
        trained.dataset(job.rows),
        passes,
        top=options.top,
        progress=None if options.json else "predicted",
    )
    reasons = {bad.row: bad.reason for bad in outputs.unreadable}
    ranked = {
        i: list(zip(ranking.classes, ranking.probabilities, strict=True))[: options.top]
        for i, ranking in outputs.results.items()
    }
    pictures = _draw(job, trained, ranked) if passes.world.is_main else {}
    for i, row in enumerate(job.rows if passes.world.is_main else ()):
        best = ranked.get(i, [])
        if options.json:
            line: dict[str, Any] = {"path": str(row.path)}
            if row.start_s is not None:
                line |= {"start_s": row.start_s, "end_s": row.end_s}
            if i in reasons:
                line["error"] = reasons[i]
            else:
                line["predictions"] = [{"class": k, "name": names[k], "probability": round(p, 6)} for k, p in best]
            if i in pictures:
                line["picture"] = str(pictures[i])
            print(json.dumps(line))
        elif i not in reasons:
            print(escaped(row.name))
            for k, probability in best:
                label = names[k] if names[k] == str(k) else f"{names[k]} ({k})"
                print(escaped(f"  {probability:7.2%}  {label}"))
            if i in pictures:
                say(f"  picture  {pictures[i]}")
    return outputs.unreadable


def _draw(
    job: PredictionJob, trained: Trained, ranked: Mapping[int, Sequence[tuple[int, float]]]
) -> dict[int, Path]:
    """Draw the tokens that the classifier kept, if asked for; return the pictures' paths by row."""
    if job.options.show is None or not ranked:
        return {}
    names, views = trained.class_names, job.settings.num_views
    over = "" if views == 1 else f" (mean of {views} views; the picture shows the middle one)"
    said = [", ".join(f"{p:.1%} {names[k]}" for k, p in best) + over for best in ranked.values()]
    drawn = draw_seen(trained, [job.rows[i] for i in ranked], said, job.options.show)
    return {i: path for i, path in zip(ranked, drawn, strict=True) if path is not None}


def _features(job: PredictionJob, trained: Trained, passes: Passes) -> tuple[UnreadableRow, ...]:
    """Write a row for each readable video. The metadata name videos, windows, weights and views."""
    outputs = trained.features(job.rows, passes, progress="features of")
    target = job.options.features
    if passes.world.is_main and outputs.results and target is not None:
        features_ND = torch.stack(list(outputs.results.values()))
        found = [job.rows[row] for row in outputs.results]
        metadata = {
            "paths": json.dumps([str(row.path) for row in found]),
            "windows": json.dumps([None if row.start_s is None else [row.start_s, row.end_s] for row in found]),
            "checkpoint": json.dumps(identify(job.origin, weights_kind(job.origin, job.options.weights))),
            "views": json.dumps(view_recipe(job.settings, trained.num_kept)),
        }
        write_whole(target, lambda path: save_safetensors({"features": features_ND}, path, metadata))
        say(f"{len(features_ND)} videos x {features_ND.shape[1]} features -> {target}")
    return outputs.unreadable
