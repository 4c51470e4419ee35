from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from everest_ds.errors import UserError
from everest_ds.model.importance import rero_importance
from everest_ds.model.packing import Packing, TokenSet
from everest_ds.model.selection import (
    Selection,
    SelectionRule,
    rank_by_importance,
    running_cells,
    select_rero,
    select_rero_varying,
)
from everest_ds.tokens import (
    ClipCounts,
    OrderName,
    StrategyName,
    TargetName,
    TokenGrid,
    bound_counts,
    count_kept,
    ratio_to_count,
)

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
    """The definition in plain Python: rank tokens, then choose visible ones by the noise of the ranks."""
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


CPU = torch.device("cpu")


def clips_of(index: TokenSet) -> list[list[int]]:
    """Return each clip's positions."""
    return [part.tolist() for part in index.position_M.split(index.packing.lengths)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[SelectionRule, TokenGrid, torch.Tensor, torch.Tensor]:
    """Generate a rule with a matching grid, importance with ties, and noise."""
    strategy: StrategyName = draw(st.sampled_from(get_args(StrategyName)))
    targets: TargetName = draw(st.sampled_from(get_args(TargetName)))
    if strategy == "running_cell":
        grid = TokenGrid(
            time=4 * draw(st.integers(1, 3)), rows=2 * draw(st.integers(1, 3)), cols=2 * draw(st.integers(1, 3))
        )
        selected = draw(st.sampled_from([0.25, 0.5, 0.75]))
    else:
        grid = TokenGrid(time=draw(st.integers(2, 7)), rows=draw(st.integers(1, 5)), cols=draw(st.integers(1, 5)))
        selected = 1.0 if strategy == "all" else draw(st.integers(1, 100)) / 100
    visible = draw(st.integers(1, int(100 * selected))) / 100
    order: OrderName = draw(st.sampled_from(get_args(OrderName))) if strategy == "rero" else "descending"
    rule = SelectionRule(
        strategy=strategy, order=order, selected_ratio=selected, visible_ratio=visible, targets=targets
    )
    counts = rule.counts(grid)
    assume(counts.visible >= 1 and counts.targets >= 1)
    seed, num_clips = draw(st.integers(0, 2**32)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(seed)
    levels = draw(st.sampled_from([2, 5, 10**6]))
    importance = torch.randint(-levels, levels, (num_clips, grid.num_tokens), generator=generator).float()
    return rule, grid, importance, torch.rand(num_clips, rule.noise_length(grid), generator=generator)


@given(cases())
def test_selection_keeps_its_promises(case: Any) -> None:
    rule, grid, importance, noise = case
    counts = rule.counts(grid)
    selection = rule.select(grid, noise, importance)
    assert selection.visible.packing.lengths == (counts.visible,) * len(noise)
    assert selection.target.packing.lengths == (counts.targets,) * len(noise)
    for visible, target in zip(clips_of(selection.visible), clips_of(selection.target), strict=True):
        for positions in (visible, target):
            assert positions == sorted(set(positions))
            assert 0 <= positions[0] <= positions[-1] < grid.num_tokens
        if rule.targets == "masked":
            assert not set(visible) & set(target)
        elif rule.strategy != "running_cell":
            assert set(visible) <= set(target)
    again = rule.select(grid, noise.clone(), importance.clone())
    assert torch.equal(again.visible.position_M, selection.visible.position_M)
    assert torch.equal(again.target.position_M, selection.target.position_M)


@given(cases(), st.randoms(use_true_random=False))
def test_permuting_clips_permutes_the_selection(case: Any, random: Any) -> None:
    rule, grid, importance, noise = case
    order = list(range(len(noise)))
    random.shuffle(order)
    selection, moved = rule.select(grid, noise, importance), rule.select(grid, noise[order], importance[order])
    for name in ("visible", "target"):
        before, after = clips_of(getattr(selection, name)), clips_of(getattr(moved, name))
        assert after == [before[clip] for clip in order]


@pytest.mark.gpu
@given(cases())
def test_same_noise_gives_the_same_choice_on_cpu_and_gpu(case: Any) -> None:
    rule, grid, importance, noise = case
    here, there = rule.select(grid, noise, importance), rule.select(grid, noise.cuda(), importance.cuda())
    for ours, theirs in ((here.visible, there.visible), (here.target, there.target)):
        assert torch.equal(ours.position_M, theirs.position_M.cpu())
        assert torch.equal(ours.clip_M, theirs.clip_M.cpu())


def plain_selection(
    rule: SelectionRule, grid: TokenGrid, importance: list[float], noise: list[float]
) -> tuple[list[int], list[int]]:
    """Return one clip's selection by the definition of each strategy, in plain Python."""
    places, num_tokens = grid.tokens_per_step, grid.num_tokens
    selected_share, visible_share = (Fraction(str(r)) for r in (rule.selected_ratio, rule.visible_ratio))

    def by_noise(count: int) -> list[int]:
        return sorted(range(count), key=lambda i: (noise[i], i))

    def tubes(share: Fraction) -> list[int]:
        return [
            place + step * places
            for place in by_noise(places)[: math.ceil(share * places)]
            for step in range(grid.time)
        ]

    if rule.strategy == "rero":
        sign = -1 if rule.order == "descending" else 1
        ranked = sorted(range(num_tokens), key=lambda n: (sign * importance[n], n))[
            : int(selected_share * num_tokens)
        ]
        selected = ranked
        visible = [ranked[rank] for rank in by_noise(len(ranked))[: int(visible_share * num_tokens)]]
    elif rule.strategy in ("random", "all"):
        selected = by_noise(num_tokens)[: int(selected_share * num_tokens)]
        visible = selected[: int(visible_share * num_tokens)]
    elif rule.strategy == "tube":
        selected, visible = tubes(selected_share), tubes(visible_share)
    else:
        visible = tubes(visible_share)
        kept = int(selected_share * 4)
        cell = deque([True] * kept + [False] * (4 - kept))
        cell.rotate(-int(noise[places] * 4))
        selected = []
        for step in range(grid.time):
            for row in range(grid.rows):
                for col in range(grid.cols):
                    if cell[2 * (row % 2) + col % 2]:
                        selected.append((step * grid.rows + row) * grid.cols + col)
            cell.rotate(-1)
    target = selected if rule.targets == "selected" else [n for n in selected if n not in set(visible)]
    return sorted(visible), sorted(target)


@given(cases())
def test_selection_equals_plain_python(case: Any) -> None:
    rule, grid, importance, noise = case
    selection = rule.select(grid, noise, importance)
    for b, found in enumerate(zip(clips_of(selection.visible), clips_of(selection.target), strict=True)):
        assert found == plain_selection(rule, grid, importance[b].tolist(), noise[b].tolist())


@given(cases())
def test_what_a_classifier_keeps_is_what_is_selected(case: Any) -> None:
    rule, grid, importance, noise = case
    if rule.strategy == "running_cell":
        noise = noise[:, -1:]
    kept = rule.keep(grid, len(noise), CPU, noise, importance)
    assert kept.packing.lengths == (rule.num_kept(grid),) * len(noise)
    for b, positions in enumerate(clips_of(kept)):
        assert positions == sorted(set(positions))
        if rule.strategy == "running_cell":
            cells = running_cells(noise[b], grid, int(4 * rule.selected_ratio))
            assert positions == cells[0].nonzero()[:, 0].tolist()
        elif rule.strategy == "rero" or rule.num_kept(grid) < grid.num_tokens:
            visible, target = plain_selection(rule, grid, importance[b].tolist(), noise[b].tolist())
            assert positions == sorted({*visible, *target})
        else:
            assert positions == list(range(grid.num_tokens))


def test_tube_keeps_the_counts_of_videomae() -> None:
    """A mask ratio of 0.9 keeps 20 of 196 places: 160 tokens, not 156."""
    grid = TokenGrid(time=8, rows=14, cols=14)
    rule = SelectionRule(strategy="tube", selected_ratio=1.0, visible_ratio=0.1)
    assert rule.counts(grid) == ClipCounts(selected=1568, visible=160, targets=1408)
    dual = SelectionRule(strategy="running_cell", selected_ratio=0.5, visible_ratio=0.1)
    assert dual.counts(grid) == ClipCounts(selected=784, visible=160, targets=704)


@given(st.integers(0, 2**32), st.integers(1, 6), st.booleans(), st.sampled_from(get_args(OrderName)))
def test_varying_counts_equal_each_clip_alone(seed: int, num_clips: int, both: bool, order: OrderName) -> None:
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randint(0, 6, (num_clips, 24), generator=generator).float()
    selected = torch.randint(2, 25, (num_clips,), generator=generator).tolist()
    visible = [int(torch.randint(1, s, (1,), generator=generator)) for s in selected]
    noise = torch.rand(num_clips, 24, generator=generator)
    counts = [ClipCounts(selected=s, visible=v, targets=s - v) for s, v in zip(selected, visible, strict=True)]
    packed = select_rero_varying(importance, noise, counts, keep_visible_as_target=both, order=order)
    alone = Selection.join(
        [
            select_rero(
                importance[b : b + 1],
                noise[b : b + 1, :s],
                num_visible=visible[b],
                keep_visible_as_target=both,
                order=order,
            )
            for b, s in enumerate(selected)
        ]
    )
    for ours, theirs in ((packed.visible, alone.visible), (packed.target, alone.target)):
        assert ours.packing.lengths == theirs.packing.lengths
        assert torch.equal(ours.position_M, theirs.position_M)
        assert torch.equal(ours.clip_M, theirs.clip_M)
        assert torch.equal(ours.packing.cu_seqlens, theirs.packing.cu_seqlens)


@given(
    st.integers(1, 200),
    st.integers(1, 100),
    st.integers(1, 100),
    st.integers(1, 400),
    st.sampled_from(get_args(TargetName)),
)
def test_bounds_enclose_every_rounding(
    selected: int, visible: int, average: int, clip: int, targets: TargetName
) -> None:
    assume(visible <= average)
    counts = ClipCounts(selected=average, visible=visible, targets=average - visible)
    least, most = (bound_counts(counts, clip, targets, upper=upper) for upper in (False, True))
    exact = Fraction(clip * visible, average)
    assert least.visible <= exact <= most.visible <= least.visible + 1
    hidden = clip - exact if targets == "masked" else clip
    assert least.targets <= hidden <= most.targets


GRID = TokenGrid(time=4, rows=2, cols=2)


@pytest.mark.parametrize(
    ("rule", "noise", "importance", "message"),
    [
        ({}, torch.rand(2, 4), None, "chooses by importance"),
        ({}, torch.rand(2, 5), torch.rand(2, 16), "expected 4 noise values a clip, got 5"),
        ({"strategy": "tube"}, torch.rand(2, 16), None, "expected 4 noise values a clip, got 16"),
        ({"strategy": "random"}, torch.rand(2, 4), None, "expected 16 noise values"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    rule: dict[str, Any], noise: torch.Tensor, importance: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SelectionRule(selected_ratio=0.3, visible_ratio=0.1, **rule).select(GRID, noise, importance)


def test_drawing_classifier_without_noise_and_counts_for_the_wrong_strategy_are_refused() -> None:
    rule = SelectionRule(strategy="random", selected_ratio=0.5)
    with pytest.raises(ValueError, match="needs noise for 3 clips"):
        rule.keep(GRID, 3, CPU)
    with pytest.raises(ValueError, match="equally many tokens"):
        rule.select(GRID, torch.rand(1, 16), None, [ClipCounts(selected=8, visible=1, targets=7)])
    for counts, message in (
        ([ClipCounts(selected=5, visible=1, targets=4)] * 2, "counts of 2 clips, importance of 1"),
        ([ClipCounts(selected=17, visible=1, targets=16)], "selected=17"),
        ([ClipCounts(selected=4, visible=5, targets=0)], "visible=5 must be between 1 and 4"),
    ):
        with pytest.raises(ValueError, match=message):
            select_rero_varying(torch.rand(1, 16), torch.rand(1, 16), counts)


@pytest.mark.parametrize(
    ("strategy", "grid", "ratio", "message"),
    [
        ("running_cell", TokenGrid(time=4, rows=3, cols=2), 0.5, "even token rows"),
        ("running_cell", TokenGrid(time=6, rows=2, cols=2), 0.5, "multiple of 4 time steps"),
        ("running_cell", GRID, 0.3, "0.25, 0.5 or 0.75"),
        ("all", GRID, 0.5, "set the ratio to 1"),
        ("tube", GRID, 0.0, "outside"),
        ("rero", GRID, 1.5, "outside"),
    ],
)
def test_ratios_that_cannot_be_kept_are_refused(
    strategy: StrategyName, grid: TokenGrid, ratio: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        count_kept(strategy, grid, ratio)
