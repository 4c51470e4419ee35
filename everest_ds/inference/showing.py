"""The work of `everest show`: pictures of the tokens that are kept of videos, and of reconstructions."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from os import fsdecode, fsencode
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from everest_ds import distributed
from everest_ds.console.messages import say
from everest_ds.data.clips.views import ViewDataset, make_view_loader
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.video import VideoReadError
from everest_ds.distributed import World
from everest_ds.errors import UserError, escaped
from everest_ds.files import atomic_path
from everest_ds.inference.job import ShowJob, ShowOptions
from everest_ds.inference.loaded import MIDDLE, LoadedModel, VideoClip, fresh_model, load_model
from everest_ds.inference.trained import Trained
from everest_ds.model.selection import SelectionRule
from everest_ds.pictures.clip_sheet import draw_clip
from everest_ds.pictures.examine import choose_frames
from everest_ds.pictures.frame_sheet import draw_frame_choice
from everest_ds.pictures.moving import frame_seconds, moving_pictures, save_gif, save_mp4
from everest_ds.tokens import CELL_TOKENS, StrategyName, TokenGrid, count_candidate_steps

Drawn = TypeVar("Drawn")

EXIT_UNREADABLE = 2
ALPHA = 1.5
"""Candidate frames of `--frames` for each frame of a clip, if the configuration has none; the paper's value."""
_COMPARED: tuple[StrategyName, ...] = ("rero", "random", "tube", "running_cell")
_LONGEST_NAME = 180
"""Bytes of a video's name in a picture's name. File systems allow 255, and prefix and suffix need some."""


def run(job: ShowJob, world: World) -> int:
    """Draw pictures; the processes of a launch divide the videos among themselves.

    Returns:
        The exit code: 2 if no video could be drawn, or if one could not and this is not allowed; otherwise 0. The
        readable videos are drawn in any case.

    Raises:
        UserError: The weights cannot be used, or a ratio is not possible with a strategy.
    """
    options, rows = job.options, job.rows[world.rank :: world.size]
    if job.origin is None:
        assert job.recipe is not None
        loaded = fresh_model(job.recipe, reader=options.reader)
    else:
        loaded = load_model(job.origin, job.recipe, weights=options.weights, reader=options.reader)
    distributed.select_accelerator()
    if torch.cuda.is_available():
        loaded.model.to("cuda")
    rules = rules_to_show(loaded, options)
    options.out.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        say(loaded.report)
    names = picture_names(job.rows)[world.rank :: world.size]
    num_bad = 0
    for i, done in draw_rows(loaded, rows, lambda i, clip: _draw_all(loaded, clip, rules, options, names[i])):
        if isinstance(done, str):
            num_bad += 1
            print(escaped(f"cannot read {rows[i].name}: {done}"), file=sys.stderr, flush=True)
        else:
            say(f"{rows[i].name} -> {', '.join(map(str, done))}")
    return EXIT_UNREADABLE if num_bad > (len(rows) - 1 if options.allow_unreadable else 0) else 0


def draw_rows(
    loaded: LoadedModel, rows: Sequence[VideoRow], draw: Callable[[int, VideoClip], Drawn]
) -> Iterator[tuple[int, Drawn | str]]:
    """Read the middle clip of each row and draw it; yield the row's number with the result of ``draw``.

    For an unreadable row, the reason is yielded instead. Several videos are read in a worker, which is replaced if
    it hangs.
    """
    data = replace(loaded.data(), num_workers=1 if len(rows) > 1 else 0)
    loader = make_view_loader(ViewDataset(rows, data, MIDDLE), [[i] for i in range(len(rows))], pin_memory=False)
    with contextlib.closing(iter(loader)) as groups:
        for (views,) in groups:
            try:
                if views.clips_VCTHW is None:
                    raise VideoReadError(rows[views.index].path, views.bad or "")
                yield views.index, draw(views.index, loaded.clip_of(rows[views.index], views.clips_VCTHW[0]))
            except VideoReadError as error:
                yield views.index, error.reason


def draw_seen(trained: Trained, rows: Sequence[VideoRow], said: Sequence[str], out: Path) -> list[Path | None]:
    """Draw the tokens that a classifier kept of each row, with a line from ``said``; return paths, or None."""
    out.mkdir(parents=True, exist_ok=True)
    loaded = LoadedModel(
        model=trained.model, settings=trained.settings, rule=trained.model.rule, report=trained.report
    )
    names = picture_names(rows)

    def draw(i: int, clip: VideoClip) -> Path:
        lines = [said[i], *loaded.captions(clip)]
        sheet = draw_clip(loaded.examine(clip), title=clip.row.path.name, lines=lines)
        return _save(sheet, out / f"{names[i]}.png")

    return [None if isinstance(done, str) else done for _, done in draw_rows(loaded, rows, draw)]


def _save(image: Image.Image, path: Path) -> Path:
    with atomic_path(path) as partial:
        image.save(partial, format="PNG")
    return path


def _draw_all(
    loaded: LoadedModel,
    clip: VideoClip,
    rules: Sequence[tuple[str, SelectionRule]],
    options: ShowOptions,
    name: str,
) -> list[Path]:
    """Write all requested pictures of a clip and return their paths."""
    picture, title = loaded.examine(clip, rules), clip.row.path.name
    sheet = draw_clip(picture, title=title, lines=loaded.captions(clip))
    paths = [_save(sheet, options.out / f"{name}.png")]
    if options.frames:
        paths.append(_draw_frames(loaded, clip.row, options.out / f"{name}-frames.png"))
    if options.gif or options.mp4:
        images, seconds = moving_pictures(picture, title=title), frame_seconds(picture)
        for wanted, suffix, save in ((options.gif, "gif", save_gif), (options.mp4, "mp4", save_mp4)):
            if wanted:
                paths.append(options.out / f"{name}.{suffix}")
                with atomic_path(paths[-1]) as partial:
                    save(images, seconds, partial)
    return paths


def _draw_frames(loaded: LoadedModel, row: VideoRow, path: Path) -> Path:
    """Write the picture of the frame selection."""
    tubelet, num_steps = loaded.options.tubelet_size, loaded.grid.time
    candidates = loaded.candidate_steps or count_candidate_steps(num_steps, ALPHA)
    clip = loaded.read(row, num_frames=candidates * tubelet)
    _, choice = choose_frames(loaded.model, clip.clip_CTHW.to(loaded.device), loaded.rule, num_steps)
    sheet = draw_frame_choice(
        np.ascontiguousarray(clip.clip_CTHW.permute(1, 2, 3, 0).numpy()),
        choice.counts_BC[0].cpu().numpy(),
        choice.steps_BT[0].tolist(),
        [f"{time:.2f} s" for time in clip.times_s],
        title=f"{row.path.name}: frame selection",
        lines=[
            clip.describe(),
            f"{num_steps} of {candidates} time steps are drawn without replacement. c: the step's tokens among the "
            f"{loaded.rule.selected_ratio:.0%} of all candidates that change most; p = c / sum of c: its "
            "probability to be drawn first.",
            loaded.captions(clip)[-1],
        ],
    )
    return _save(sheet, path)


def rules_to_show(loaded: LoadedModel, options: ShowOptions) -> list[tuple[str, SelectionRule]]:
    """Return the selection rules to draw, with labels: one for each ratio, and with --compare for each strategy.

    The visible share of the kept tokens is the model's own.

    Raises:
        UserError: A ratio is not possible with a strategy.
    """
    own, grid = loaded.rule, loaded.grid
    rules = []
    for ratio in options.ratios or (own.selected_ratio,):
        for strategy in _COMPARED if options.compare else (own.strategy,):
            rule = _with_ratio(own, strategy, ratio, grid, is_own=not options.ratios and strategy == own.strategy)
            if rule is None:
                say(f"warning: {strategy} is left out: it does not fit {grid}")
                continue
            _require_tokens(rule, grid, predicts=loaded.predicts)
            rules.append((loaded.describe_rule(rule), rule))
    return rules


def _require_tokens(rule: SelectionRule, grid: TokenGrid, *, predicts: bool) -> None:
    """Refuse a rule that leaves no visible or no predicted token."""
    try:
        counts = rule.counts(grid) if predicts else None
        fewest = min(counts.visible, counts.targets) if counts else rule.num_kept(grid)
    except UserError as error:
        raise UserError(f"--ratios {rule.selected_ratio:g} with {rule.strategy}: {error}") from error
    if fewest < 1:
        purposes = "one visible and one predicted token" if predicts else "one token"
        raise UserError(
            f"--ratios {rule.selected_ratio:g} of {grid.num_tokens} tokens is less than {purposes}; give more"
        )


def _with_ratio(
    own: SelectionRule, strategy: StrategyName, ratio: float, grid: TokenGrid, *, is_own: bool
) -> SelectionRule | None:
    """Return a rule that keeps about this ratio of the tokens; None if the strategy does not fit the clip."""
    if is_own:
        return own
    visible = own.visible_ratio / own.selected_ratio
    order = own.order if strategy == "rero" else "descending"
    if strategy == "running_cell":
        if grid.rows % 2 or grid.cols % 2 or grid.time % CELL_TOKENS:
            return None
        ratio = min((0.25, 0.5, 0.75), key=lambda share: abs(share - ratio))
    return replace(
        own, strategy=strategy, order=order, selected_ratio=ratio, visible_ratio=float(f"{ratio * visible:.6g}")
    )


def picture_names(rows: Sequence[VideoRow]) -> list[str]:
    """Return a file name for each row, without suffix: the video's name, numbered if several have the same."""
    names: list[str] = []
    taken: set[str] = set()
    for row in rows:
        stem = fsdecode(fsencode(row.path.stem)[:_LONGEST_NAME]) or "video"
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        names.append(name)
    return names
