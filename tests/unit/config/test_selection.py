"""Settings of token and frame selection are checked when the configuration is built; errors name the fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from everest_ds.config import Config, SelectionConfig
from everest_ds.errors import UserError
from everest_ds.recipes import get_recipe
from everest_ds.tokens import ClipCounts, TokenGrid

PRETRAIN = get_recipe("k400_vit_b")
FINETUNE = get_recipe("k400_vit_b_ft")


@pytest.mark.parametrize(
    ("recipe", "fields", "named"),
    [
        (PRETRAIN, {"selected_ratio": 0.0}, ["selection.selected_ratio=0.0", "(0, 1]"]),
        (PRETRAIN, {"selected_ratio": 1.1}, ["selection.selected_ratio=1.1"]),
        (PRETRAIN, {"visible_ratio": -0.1}, ["selection.visible_ratio=-0.1"]),
        (PRETRAIN, {"selected_ratio": float("nan")}, ["selection.selected_ratio=nan"]),
        (
            PRETRAIN,
            {"visible_ratio": 0.4},
            ["selection.visible_ratio=0.4", "selection.selected_ratio=0.3", "lower it"],
        ),
        (PRETRAIN, {"alpha": 0.9}, ["selection.alpha=0.9", "at least 1"]),
        (PRETRAIN, {"alpha": float("nan")}, ["selection.alpha=nan"]),
        (PRETRAIN, {"budget": "batch", "floor": 0.4}, ["selection.floor=0.4", "selection.selected_ratio=0.3"]),
        (PRETRAIN, {"budget": "batch", "ceiling": 0.2}, ["selection.ceiling=0.2", "selection.selected_ratio=0.3"]),
        (PRETRAIN, {"budget": "threshold", "floor": 0.0}, ["selection.floor=0.0", "(0, 1]"]),
        (PRETRAIN, {"budget": "threshold", "ceiling": 1.5}, ["selection.ceiling=1.5", "(0, 1]"]),
        (PRETRAIN, {"budget": "threshold", "quantile_decay": 1.0}, ["selection.quantile_decay=1.0", "[0, 1)"]),
        (PRETRAIN, {"floor": 0.2}, ["selection.floor=0.2", "selection.budget=clip", "remove it"]),
        (PRETRAIN, {"quantile_decay": 0.9}, ["selection.quantile_decay=0.9", "selection.budget=clip"]),
        (PRETRAIN, {"ceiling": 0.5}, ["selection.ceiling=0.5", "selection.budget=clip"]),
        (
            PRETRAIN,
            {"strategy": "random", "budget": "batch"},
            ["selection.budget=batch", "selection.strategy=random"],
        ),
        (
            PRETRAIN,
            {"strategy": "tube", "order": "ascending"},
            ["selection.order=ascending", "selection.strategy=tube"],
        ),
        (
            PRETRAIN,
            {"strategy": "random", "distance": "cka"},
            ["selection.distance=cka", "selection.strategy=random"],
        ),
        (PRETRAIN, {"strategy": "all"}, ["selection.strategy=all", "selection.selected_ratio=0.3", "must be 1"]),
        (PRETRAIN, {"strategy": "running_cell"}, ["selection.selected_ratio=0.3", "0.25, 0.5 or 0.75"]),
        (
            PRETRAIN,
            {"budget": "batch", "floor": 0.002},
            ["selection.floor=0.002", "keeps 3 of 1568 tokens", "raise it"],
        ),
        (
            PRETRAIN,
            {"budget": "batch", "floor": 0.003, "visible_ratio": 0.299},
            ["selection.floor=0.003", "keeps 4 of 1568 tokens"],
        ),
        (FINETUNE, {"strategy": "all"}, ["selection.strategy=all", "selection.keep_ratio=0.6"]),
        (FINETUNE, {"strategy": "running_cell"}, ["selection.keep_ratio=0.6", "running_cell"]),
        (FINETUNE, {"strategy": "random", "order": "ascending"}, ["selection.order=ascending"]),
        (FINETUNE, {"keep_ratio": 0.0}, ["selection.keep_ratio=0.0"]),
        (FINETUNE, {"keep_ratio": 0.0001}, ["selection.keep_ratio=0.0001", "keeps none"]),
    ],
    ids=lambda value: getattr(value, "task", None) or str(value),
)
def test_settings_that_cannot_be_name_their_fields(
    recipe: Config, fields: dict[str, Any], named: list[str]
) -> None:
    section = type(recipe.selection)  # type: ignore[attr-defined]
    with pytest.raises(UserError) as caught:
        replace(recipe, selection=section(**fields))  # type: ignore[call-arg]
    assert all(part in str(caught.value) for part in named), caught.value


def test_alpha_that_adds_no_candidate_is_refused() -> None:
    with pytest.raises(UserError, match=r"alpha=1.1 x 8 time steps adds no candidates.*at least 1.125, or 1"):
        replace(PRETRAIN, selection=SelectionConfig(alpha=1.1))
    assert replace(PRETRAIN, selection=SelectionConfig(alpha=1.125)).candidate_steps == 9


def test_cells_have_to_fill_the_grid() -> None:
    cells = SelectionConfig(strategy="running_cell", selected_ratio=0.5)
    for data in ({"image_size": 240}, {"num_frames": 12}):
        with pytest.raises(UserError, match="even token rows and columns and a multiple of 4 time steps"):
            replace(PRETRAIN, data=replace(PRETRAIN.data, **data), selection=cells)


@pytest.mark.parametrize(
    ("fields", "counts", "most"),
    [
        ({}, (470, 156, 314), (470, 156, 314)),
        ({"targets": "selected"}, (470, 156, 470), (470, 156, 470)),
        ({"strategy": "tube", "selected_ratio": 1.0}, (1568, 160, 1408), (1568, 160, 1408)),
        ({"strategy": "running_cell", "selected_ratio": 0.5}, (784, 160, 704), (784, 160, 704)),
        ({"strategy": "all", "selected_ratio": 1.0}, (1568, 156, 1412), (1568, 156, 1412)),
        ({"budget": "batch"}, (470, 156, 314), (940, 312, 628)),
        ({"budget": "threshold", "floor": 0.1, "ceiling": 1.0}, (470, 156, 314), (1568, 521, 1048)),
    ],
    ids=str,
)
def test_counts_and_bounds_are_known_before_launch(
    fields: dict[str, Any], counts: tuple[int, ...], most: tuple[int, ...]
) -> None:
    config = replace(PRETRAIN, selection=SelectionConfig(**fields))
    for found, expected in ((config.counts, counts), (config.most, most)):
        assert found == ClipCounts(selected=expected[0], visible=expected[1], targets=expected[2])
    assert config.least_selected <= config.num_selected
    assert ("at most" in config.tokens) == (most != counts)


@pytest.mark.parametrize(("alpha", "frames"), [(1.0, 16), (1.3, 20), (1.5, 24), (1.8, 28), (2.0, 32)])
def test_candidate_frames_are_whole_pairs(alpha: float, frames: int) -> None:
    """floor(2 * alpha * tau) frames, rounded down to an even number: 1.3 * 8 steps give 10 steps."""
    config = replace(PRETRAIN, selection=SelectionConfig(alpha=alpha))
    assert config.candidate_frames == frames
    assert config.candidate_grid == TokenGrid(time=frames // 2, rows=14, cols=14)
    assert (f"of {frames} candidate frames" in config.tokens) == (frames > 16)
