from __future__ import annotations

from fractions import Fraction

import pytest

from everest_ds.errors import UserError
from everest_ds.tokens import TokenGrid, ratio_to_count


def test_grid_of_clip_counts_tubelets() -> None:
    grid = TokenGrid.of_clip(num_frames=16, height=224, width=224, tubelet_size=2, patch_size=16)
    assert (grid.time, grid.rows, grid.cols, grid.tokens_per_step, grid.num_tokens) == (8, 14, 14, 196, 1568)


@pytest.mark.parametrize(
    ("ratio", "count"),
    [(0.1, 156), (0.2, 313), (0.3, 470), (0.4, 627), (0.5, 784), (0.6, 940), (0.7, 1097), (0.8, 1254), (1.0, 1568)],
)
def test_ratio_to_count_gives_the_paper_counts(ratio: float, count: int) -> None:
    assert ratio_to_count(1568, ratio) == count


def test_ratio_to_count_is_exact_for_every_decimal() -> None:
    for num_tokens in range(1, 400):
        for percent in range(1, 101):
            expected = num_tokens * percent // 100  # integer arithmetic is exact
            assert ratio_to_count(num_tokens, percent / 100) == expected
            assert ratio_to_count(num_tokens, percent / 100) == int(num_tokens * Fraction(percent, 100))


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_ratio_to_count_refuses_ratios_outside_the_interval(ratio: float) -> None:
    with pytest.raises(UserError, match="outside"):
        ratio_to_count(1568, ratio)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 15}, "num_frames=15 is not a positive multiple of tubelet_size=2; use 14 or 16"),
        ({"height": 220}, "image height=220 is not a positive multiple of patch_size=16; use 208 or 224"),
        ({"width": 8}, "image width=8 is not a positive multiple of patch_size=16; use 16 or 32"),
        ({"tubelet_size": 0}, "tubelet_size=0 must be at least 1"),
    ],
)
def test_grid_of_clip_names_the_nearest_lengths(change: dict[str, int], message: str) -> None:
    good = {"num_frames": 16, "height": 224, "width": 224, "tubelet_size": 2, "patch_size": 16}
    with pytest.raises(UserError) as caught:
        TokenGrid.of_clip(**{**good, **change})
    assert str(caught.value) == message
