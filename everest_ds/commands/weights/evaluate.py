"""`everest evaluate`: scores a trained model on a list of videos, with several views of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from everest_ds.commands.parsing import parse
from everest_ds.config import Config, FinetuneConfig
from everest_ds.data.lists.video_list import VideoRow, fingerprint, read_list, require_reachable
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.inference.job import EvaluateOptions, EvaluationJob
from everest_ds.inference.source import clip_settings, identify, weights_kind
from everest_ds.recipes import find_config
from everest_ds.train.checkpoints.origin import Origin, locate


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Score a trained model on a list of videos, with softmax averaged over several views of each.

    Writes summary.json, predictions.csv and confusion.png.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run directory (its best checkpoint, or its newest if none was scored), a checkpoint, or weights with a
    classification head in any layout; weights need --recipe."""
    options: Annotated[EvaluateOptions, tyro.conf.arg(name="")] = field(default_factory=EvaluateOptions)


def main(words: list[str], world: World) -> EvaluationJob:
    """Parse and check."""
    arguments = parse(Arguments, words, "everest evaluate", world)
    return check(arguments.source, arguments.options)


def check(source: Path, options: EvaluateOptions) -> EvaluationJob:
    """Find weights and lists, and check that they fit together.

    Raises:
        UserError: A path or a label is wrong, or no list is given.
    """
    origin, recipe = locate(source), find_config(options.recipe) if options.recipe else None
    settings = clip_settings(origin, recipe, options)
    test_list = _test_list(origin, recipe, options)
    rows, train_rows = _rows_of(test_list), _rows_of(options.train_list)
    return EvaluationJob(
        origin=origin,
        settings=settings,
        options=options,
        test_list=test_list,
        rows=rows,
        train_rows=train_rows,
        out=options.out or (origin.run_dir or origin.weights.parent) / f"evaluation-{test_list.stem}",
        identity={
            "protocol": _protocol(options, train_rows),
            "checkpoint": identify(origin, weights_kind(origin, options.weights)),
            "list": {"path": str(test_list), "videos": fingerprint(rows)},
        },
    )


def _test_list(origin: Origin, recipe: Config | None, options: EvaluateOptions) -> Path:
    if options.list is not None:
        return options.list
    config = origin.config if isinstance(origin.config, FinetuneConfig) else recipe
    if isinstance(config, FinetuneConfig) and config.data.test_list is not None:
        return Path(config.data.test_list)
    raise UserError("there is no list to score, as the run's data.test_list is not set; give --list FILE")


def _rows_of(path: Path | None) -> Sequence[VideoRow]:
    if path is None:
        return []
    rows = read_list(path)
    require_reachable(rows, path)
    return rows


def _protocol(options: EvaluateOptions, train_rows: Sequence[VideoRow]) -> dict[str, Any]:
    """Return the protocol and its settings."""
    if options.protocol == "head":
        return {"name": "head"}
    own = {"k": options.knn_k, "temperature": options.knn_temperature}
    return {"name": options.protocol, "train_videos": fingerprint(train_rows)} | (
        own if options.protocol == "knn" else {"l2": options.linear_l2}
    )
