"""`everest predict`: prints the classes of new videos, or writes their features."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds.commands.parsing import parse
from everest_ds.data.lists.video_list import VideoRow, find_videos, read_list, require_reachable
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.inference.job import PredictionJob, PredictOptions
from everest_ds.inference.source import clip_settings
from everest_ds.recipes import find_config
from everest_ds.train.checkpoints.origin import locate

_UNLABELLED = -1


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Print the likeliest classes of new videos, or write their features."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
    """A run directory, a checkpoint, or weights in any layout; weights need --recipe."""
    videos: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="VIDEO...")]
    """Video files, or folders to search for them; optional with --list."""
    options: Annotated[PredictOptions, tyro.conf.arg(name="")] = field(default_factory=PredictOptions)


def main(words: list[str], world: World) -> PredictionJob:
    """Parse and check."""
    arguments = parse(Arguments, words, "everest predict", world)
    return check(arguments.source, arguments.videos, arguments.options)


def check(source: Path, videos: Sequence[Path], options: PredictOptions) -> PredictionJob:
    """Find videos and weights.

    Raises:
        UserError: There are no videos, or no weights.
    """
    rows = rows_of(videos, options.list, "predict")
    origin = locate(source)
    settings = clip_settings(origin, find_config(options.recipe) if options.recipe else None, options)
    return PredictionJob(origin=origin, settings=settings, options=options, rows=rows)


def rows_of(videos: Sequence[Path], source: Path | None, command: str) -> list[VideoRow]:
    """Return the videos, then the rows of the list, all without labels.

    Raises:
        UserError: No videos and no list are given.
    """
    if not videos and source is None:
        raise UserError(f"{command} needs a video, a folder of videos, or --list FILE")
    rows = [VideoRow(path, _UNLABELLED) for path in find_videos(videos)]
    if source is not None:
        listed = read_list(source)
        require_reachable(listed, source)
        # The list's labels may belong to other classes than the head's.
        rows += [replace(row, label=_UNLABELLED) for row in listed]
    return rows
