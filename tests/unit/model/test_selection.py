from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from everest_ds.model.importance import rero_importance
from everest_ds.model.packing import Packing, TokenSet
from everest_ds.model.selection import Selection, SelectionRule, rank_by_importance, select_rero
from everest_ds.tokens import TokenGrid, ratio_to_count

IMPORTANCE_RTOL = 1e-5


def test_selection_cases_with_ties_equal_the_golden_set(golden_json: Callable[[str], Any]) -> None:
    cases = golden_json("selection_cases")["selection"]
    assert {case["time_steps"] for case in cases} == {8, 12, 4, 5}
    for case in cases:
        grid = TokenGrid(time=case["time_steps"], rows=1, cols=case["tokens_per_step"])
        importance = rero_importance(torch.tensor(case["embed"]).view(-1, grid.num_tokens, case["dim"]), grid)
        expected = torch.tensor(case["importance"])
        torch.testing.assert_close(importance, expected, rtol=IMPORTANCE_RTOL, atol=1e-7)
        assert rank_by_importance(importance).tolist() == case["order_stable"]
        count = ratio_to_count(grid.num_tokens, case["rho"])
        assert count == case["num_selected"]
        rule = SelectionRule(selected_ratio=case["rho"])
        index = rule.keep(grid, len(expected), importance.device, None, importance)
        assert index.position_M.view(len(expected), -1).tolist() == case["selected_sorted"]


def test_importance_equals_plain_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    grid = TokenGrid(time=3, rows=2, cols=2)
    x_BND = torch.randn(2, 12, 5, generator=generator)
    importance = rero_importance(x_BND, grid)
    for b in range(2):
        for step in range(3):
            for place in range(4):
                now, before = (x_BND[b, t * 4 + place] for t in (max(step, 1), max(step, 1) - 1))
                expected = math.sqrt(sum((p - q) ** 2 for p, q in zip(now.tolist(), before.tolist(), strict=True)))
                assert importance[b, step * 4 + place].item() == pytest.approx(expected, rel=1e-5)


def test_first_step_ties_with_the_second_and_comes_first() -> None:
    grid = TokenGrid(time=2, rows=1, cols=3)
    importance = rero_importance(torch.randn(1, 6, 4), grid)
    assert torch.equal(importance[:, :3], importance[:, 3:])
    order = rank_by_importance(importance)[0].tolist()
    assert all(order[i] + 3 == order[i + 1] for i in (0, 2, 4))


@pytest.mark.parametrize(
    ("x", "grid", "message"),
    [
        (torch.zeros(1, 8, 2).bfloat16(), TokenGrid(time=2, rows=2, cols=2), "float32"),
        (torch.zeros(1, 9, 2), TokenGrid(time=2, rows=2, cols=2), "expected 8 tokens"),
        (torch.zeros(1, 4, 2), TokenGrid(time=1, rows=2, cols=2), "only one"),
    ],
)
def test_importance_refuses_what_it_cannot_rank(x: torch.Tensor, grid: TokenGrid, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rero_importance(x, grid)


def plain_rero(importance: list[float], noise: list[float], num_visible: int) -> tuple[list[int], list[int]]:
    """The definition in plain Python: rank, then let the noise of the ranks decide."""
    ranked = sorted(range(len(importance)), key=lambda position: (-importance[position], position))
    by_noise = sorted(range(len(noise)), key=lambda rank: (noise[rank], rank))
    chosen = [ranked[rank] for rank in by_noise]
    return sorted(chosen[:num_visible]), sorted(chosen[num_visible:])


@pytest.mark.parametrize("levels", [3, 1000])
def test_rero_equals_plain_python_with_and_without_ties(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    importance = torch.randint(0, levels, (4, 30), generator=generator).float()
    noise = torch.rand(4, 12, generator=generator)
    selection = select_rero(importance, noise, num_visible=5)
    visible = selection.visible.position_M.view(4, -1).tolist()
    target = selection.target.position_M.view(4, -1).tolist()
    for b in range(4):
        assert (visible[b], target[b]) == plain_rero(importance[b].tolist(), noise[b].tolist(), 5)


def test_targets_can_be_all_selected_tokens() -> None:
    importance, noise = torch.rand(2, 20), torch.rand(2, 8)
    masked = select_rero(importance, noise, num_visible=3)
    everything = select_rero(importance, noise, num_visible=3, keep_visible_as_target=True)
    assert torch.equal(everything.visible.position_M, masked.visible.position_M)
    for b in range(2):
        parts = (masked.visible, masked.target)
        expected = sorted(p for part in parts for p in part.position_M[part.clip_M == b].tolist())
        target = everything.target
        assert target.position_M[target.clip_M == b].tolist() == expected


@pytest.mark.parametrize(
    ("noise", "num_visible", "message"),
    [
        (torch.rand(2, 21), 3, "must be between 1 and 20"),
        (torch.rand(2, 8), 9, "num_visible=9 must be between 1 and 8"),
        (torch.rand(2, 8), 0, "num_visible=0"),
        (torch.rand(2, 8), 8, "none is left to reconstruct"),
        (torch.rand(3, 8), 2, "noise for 3 clips"),
    ],
)
def test_impossible_counts_are_refused(noise: torch.Tensor, num_visible: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_rero(torch.rand(2, 20), noise, num_visible=num_visible)


@pytest.mark.parametrize("lengths", [[3, 3, 3], [2, 0, 5, 1], [4], [0, 0], []])
def test_packing_says_where_each_clip_is(lengths: list[int]) -> None:
    packing = Packing.from_lengths(lengths, torch.device("cpu"))
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packing.total == sum(lengths)
    assert packing.max_seqlen == max(lengths, default=0)
    expected = [clip for clip, length in enumerate(lengths) for _ in range(length)]
    assert packing.clip_of_token().tolist() == expected


def test_packing_refuses_a_negative_length() -> None:
    with pytest.raises(ValueError, match="-1 tokens"):
        Packing.from_lengths([2, -1], torch.device("cpu"))


def test_mask_and_positions_give_the_same_index() -> None:
    kept = torch.tensor([[True, False, True, False], [False, True, True, False]])
    of_mask = TokenSet.from_mask(kept)
    of_positions = TokenSet.from_positions(torch.tensor([[2, 0], [1, 2]]))
    assert torch.equal(of_mask.position_M, of_positions.position_M)
    assert torch.equal(of_mask.clip_M, of_positions.clip_M)
    assert of_mask.packing.lengths == of_positions.packing.lengths == (2, 2)


def test_selection_of_different_batches_is_refused() -> None:
    one, two = (TokenSet.from_mask(torch.ones(b, 2, dtype=torch.bool)) for b in (1, 2))
    with pytest.raises(ValueError, match="of 1 clips"):
        Selection(visible=one, target=two)
