"""`everest predict`: labels of new videos, or their features, from any trained weights."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everest_ds import distributed
from everest_ds.data.lists.video_list import VideoRow, find_videos, read_list, require_reachable
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.inference.source import (
    ClipSettings,
    InferenceOptions,
    clip_settings,
    identify,
    weights_kind,
)
from everest_ds.recipes import find_config
from everest_ds.train.checkpoints.origin import locate

if TYPE_CHECKING:
    import torch

    from everest_ds.inference.passes import UnreadableRow
    from everest_ds.inference.trained import Trained

EXIT_UNREADABLE = 2
_UNLABELLED = -1


@dataclass(frozen=True, kw_only=True)
class PredictOptions(InferenceOptions):
    """What is said of each video."""

    list: Path | None = None
    """List of videos, after those that are named: each row, or the window of it. Labels are not used."""
    top: int = 5
    """Classes to name for each video."""
    json: bool = False
    """One JSON line a video instead of a table."""
    features: Path | None = None
    """Write features instead of labels: a .safetensors file with a float32 row a video, the mean of the kept
    tokens before the last norm, averaged over the views. The weights need no head."""

    def __post_init__(self) -> None:
        """Check the number, and the file's name."""
        super().__post_init__()
        if self.top < 1:
            raise UserError(f"--top {self.top} must be at least 1")
        if self.features is None:
            return
        if self.json:
            raise UserError("--json has no effect with --features; remove it")
        if self.features.suffix != ".safetensors":
            raise UserError(f"--features {self.features} must end in .safetensors")
        if self.features.exists():
            raise UserError(f"--features {self.features} exists; remove it or name another file")


def predict(source: Path, videos: Sequence[Path], options: PredictOptions, world: World) -> int:
    """Print the likeliest classes of videos, or write their features.

    Args:
        source: A run directory, a checkpoint, or weights.
        videos: Files, and folders that are searched for files; may be none where ``options`` name a list.
        options: What is said of them.
        world: This process's place.

    Returns:
        The exit code: 0, or 2 when none could be read, or one and that is not allowed; the others are done then.

    Raises:
        UserError: There are no videos, or the weights cannot be used.
    """
    rows = _rows_of(videos, options.list)
    origin = locate(source)
    settings = clip_settings(origin, find_config(options.recipe) if options.recipe else None, options)
    on_gpu = distributed.select_accelerator()
    import torch

    from everest_ds.inference.trained import load_trained

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


def _rows_of(videos: Sequence[Path], source: Path | None) -> list[VideoRow]:
    """Return what to predict, without labels: the videos, then the rows of the list."""
    if not videos and source is None:
        raise UserError("predict needs a video, a folder of videos, or --list FILE")
    rows = [VideoRow(path, _UNLABELLED) for path in find_videos(videos)]
    if source is not None:
        listed = read_list(source)
        require_reachable(listed, source)
        # Labels may be of other classes than the head's.
        rows += [replace(row, label=_UNLABELLED) for row in listed]
    return rows


def _window(row: VideoRow) -> dict[str, float | None]:
    """Return what a JSON line says of a row's window; nothing without one."""
    return {} if row.start_s is None else {"start_s": row.start_s, "end_s": row.end_s}


def _labels(
    trained: "Trained",
    rows: list[VideoRow],
    settings: ClipSettings,
    options: PredictOptions,
    world: World,
    device: "torch.device",
) -> "tuple[UnreadableRow, ...]":
    from everest_ds.data.clips.views import ViewDataset
    from everest_ds.inference.passes import map_rows
    from everest_ds.inference.scores import Ranking, rank_classes

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
    trained: "Trained",
    rows: list[VideoRow],
    settings: ClipSettings,
    options: PredictOptions,
    identity: dict[str, Any],
    world: World,
    device: "torch.device",
) -> "tuple[UnreadableRow, ...]":
    """Write one row a readable video; metadata name the videos, their windows, the weights and the views."""
    import torch

    from everest_ds.inference.results import view_recipe
    from everest_ds.inference.trained import extract_features
    from everest_ds.model.weights.export import save_safetensors, write_whole

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
