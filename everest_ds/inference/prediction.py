"""The work of `everest predict`: the likeliest classes of videos, or a file of their features."""

import json
import sys
from dataclasses import replace
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.data.clips.views import ViewDataset
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.inference.job import PredictionJob, PredictOptions
from everest_ds.inference.passes import UnreadableRow, map_rows
from everest_ds.inference.results import view_recipe
from everest_ds.inference.scores import Ranking, rank_classes
from everest_ds.inference.source import ClipSettings, identify, weights_kind
from everest_ds.inference.trained import Trained, extract_features, load_trained
from everest_ds.model.weights.export import save_safetensors, write_whole

EXIT_UNREADABLE = 2


def run(job: PredictionJob, world: World) -> int:
    """Print the likeliest classes of videos, or write their features.

    Returns:
        The exit code: 0, or 2 when none could be read, or one and that is not allowed; the others are done then.

    Raises:
        UserError: The weights cannot be used.
    """
    origin, settings, options, rows = job.origin, job.settings, job.options, job.rows
    on_gpu = distributed.select_accelerator()
    trained = load_trained(origin, settings, options, torch.device("cuda" if on_gpu else "cpu"))
    if options.features is None and not trained.has_head:
        raise UserError(
            "these weights have no classification head; --features FILE writes what they make of the videos"
        )
    device = distributed.start(world)
    trained.model.to(device)
    if world.is_main and not options.json:
        print(f"{trained.report}\nthe model {trained.kept}", flush=True)
    if options.features is None:
        unreadable = _labels(trained, rows, settings, options, world, device)
    else:
        identity = identify(origin, weights_kind(origin, options.weights))
        unreadable = _features(trained, rows, settings, options, identity, world, device)
    if world.is_main and not options.json:
        for bad in unreadable:
            print(f"cannot read {rows[bad.row].name}: {bad.reason}", file=sys.stderr, flush=True)
    distributed.finish()
    return EXIT_UNREADABLE if len(unreadable) > (len(rows) - 1 if options.allow_unreadable else 0) else 0


def _window(row: VideoRow) -> dict[str, float | None]:
    """Return what a JSON line says of a row's window; nothing without one."""
    return {} if row.start_s is None else {"start_s": row.start_s, "end_s": row.end_s}


def _labels(
    trained: Trained,
    rows: list[VideoRow],
    settings: ClipSettings,
    options: PredictOptions,
    world: World,
    device: torch.device,
) -> tuple[UnreadableRow, ...]:
    names, top = trained.class_names, options.top
    outputs = map_rows(
        trained.wrap(trained.model),
        lambda row, logits_VK: rank_classes(logits_VK, row.label, top, str(rows[row.index].path)),
        ViewDataset(rows, settings.data, settings.views),
        group_size=options.batch_rows,
        world=world,
        device=device,
        allow_unreadable=True,
        progress=None if options.json else "predicted",
    )
    if not world.is_main:
        return outputs.unreadable

    def best(ranking: Ranking) -> list[tuple[int, float]]:
        return list(zip(ranking.classes, ranking.probabilities, strict=True))[:top]

    reasons = {bad.row: bad.reason for bad in outputs.unreadable}
    for i, row in enumerate(rows):
        if options.json:
            line: dict[str, Any] = {"path": str(row.path), **_window(row)}
            if i in reasons:
                line["error"] = reasons[i]
            else:
                line["predictions"] = [
                    {"class": k, "name": names[k], "probability": round(p, 6)} for k, p in best(outputs.results[i])
                ]
            print(json.dumps(line))
        elif i not in reasons:
            print(row.name)
            for k, probability in best(outputs.results[i]):
                label = names[k] if names[k] == str(k) else f"{names[k]} ({k})"
                print(f"  {probability:7.2%}  {label}")
    return outputs.unreadable


def _features(
    trained: Trained,
    rows: list[VideoRow],
    settings: ClipSettings,
    options: PredictOptions,
    identity: dict[str, Any],
    world: World,
    device: torch.device,
) -> tuple[UnreadableRow, ...]:
    """Write one row a readable video; metadata name the videos, their windows, the weights and the views."""
    anyway = replace(options, allow_unreadable=True)
    outputs = extract_features(trained, rows, settings, anyway, world, device, progress="features of")
    target = options.features
    if world.is_main and outputs.results and target is not None:
        features_ND = torch.stack(list(outputs.results.values()))
        found = [rows[row] for row in outputs.results]
        metadata = {
            "paths": json.dumps([str(row.path) for row in found]),
            "windows": json.dumps([None if row.start_s is None else [row.start_s, row.end_s] for row in found]),
            "checkpoint": json.dumps(identity),
            "views": json.dumps(view_recipe(settings, trained.num_kept)),
        }
        write_whole(target, lambda path: save_safetensors({"features": features_ND}, path, metadata))
        print(f"{len(features_ND)} videos x {features_ND.shape[1]} features -> {target}", flush=True)
    return outputs.unreadable
