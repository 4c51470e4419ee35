"""Budgets against a plain greedy allocation, and their bounds for any content."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.model.budgets import ClipBudget, apportion, count_above, share_budget, upper_quantile
from everest_ds.tokens import ClipCounts


def make_budget(selected: int, visible: int, least: int, most: int) -> ClipBudget:
    average = ClipCounts(selected=selected, visible=visible, targets=selected - visible)
    return ClipBudget(average=average, least=least, most=most)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[torch.Tensor], list[ClipBudget]]:
    """Generate groups of clips of different sizes: scores with or without ties, draws, budgets."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scores, draws, budgets = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        num_tokens, num_clips = draw(st.integers(12, 60)), draw(st.integers(1, 5))
        levels = draw(st.sampled_from([1, 3, 10**6]))
        scores.append(torch.randint(-levels, levels + 1, (num_clips, num_tokens), generator=generator).float())
        draws.append(torch.rand(num_clips, generator=generator))
        selected = draw(st.integers(6, num_tokens))
        least, most = draw(st.integers(4, selected)), draw(st.integers(selected, num_tokens))
        budgets.append(make_budget(selected, max(1, selected // 3), least, most))
    return scores, draws, budgets


def plain_shares(scores: list[torch.Tensor], draws: list[torch.Tensor], budgets: list[ClipBudget]) -> list[int]:
    """Return tokens per clip: one token at a time goes to the clip with the highest next score."""
    clips = [
        (sorted(row.tolist(), reverse=True), float(draw), budget)
        for group, group_draws, budget in zip(scores, draws, budgets, strict=True)
        for row, draw in zip(group, group_draws, strict=True)
    ]
    taken = [budget.least for _, _, budget in clips]
    for _ in range(sum(budget.average.selected - budget.least for _, _, budget in clips)):
        open_clips = [c for c, (_, _, budget) in enumerate(clips) if taken[c] < budget.most]
        # The best score wins; ties go to the lower rank above the floor, then to the lower draw.
        best = min(
            open_clips,
            key=lambda c: (-clips[c][0][taken[c]], taken[c] - clips[c][2].least, clips[c][1]),
        )
        taken[best] += 1
    return taken


@given(cases())
def test_shared_budget_equals_a_plain_greedy_one_and_its_totals_are_exact(case: Any) -> None:
    scores, draws, budgets = case
    counts = share_budget(scores, draws, budgets)
    flat = [count for group in counts for count in group]
    assert [count.selected for count in flat] == plain_shares(scores, draws, budgets)
    announced = [b.average for b, group in zip(budgets, scores, strict=True) for _ in range(len(group))]
    assert sum(count.selected for count in flat) == sum(average.selected for average in announced)
    assert sum(count.visible for count in flat) == sum(average.visible for average in announced)
    for group, b in zip(counts, budgets, strict=True):
        assert all(b.least <= count.selected <= b.most for count in group)
        assert all(count.targets == count.selected - count.visible for count in group)


@given(cases(), st.randoms(use_true_random=False))
def test_permuting_clips_permutes_their_shares(case: Any, random: Any) -> None:
    scores, draws, budgets = case
    counts = share_budget(scores, draws, budgets)
    orders = [list(range(len(group))) for group in scores]
    for order in orders:
        random.shuffle(order)
    moved = share_budget(
        [group[order] for group, order in zip(scores, orders, strict=True)],
        [group[order] for group, order in zip(draws, orders, strict=True)],
        budgets,
    )
    assert moved == [[group[c] for c in order] for group, order in zip(counts, orders, strict=True)]


def test_still_clip_gives_its_tokens_to_a_busy_one() -> None:
    scores = torch.cat((torch.zeros(1, 40), torch.linspace(1, 2, 40)[None]))
    (counts,) = share_budget([scores], [torch.rand(2)], [make_budget(12, 4, least=6, most=24)])
    assert [(count.selected, count.visible) for count in counts] == [(6, 2), (18, 6)]


def test_ceiling_sends_tokens_back() -> None:
    scores = torch.cat((torch.zeros(1, 40), torch.linspace(1, 2, 40)[None]))
    (counts,) = share_budget([scores], [torch.rand(2)], [make_budget(12, 4, least=3, most=15)])
    assert [(count.selected, count.visible) for count in counts] == [(9, 3), (15, 5)]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any), st.integers(0, 300), st.randoms())
def test_apportionment_is_whole_and_within_one_of_the_quota(weights: list[int], total: int, random: Any) -> None:
    priority = list(range(len(weights)))
    random.shuffle(priority)
    shares = apportion(total, weights, priority)
    assert sum(shares) == total
    quotas = [Fraction(total * weight, sum(weights)) for weight in weights]
    assert all(abs(share - quota) < 1 for share, quota in zip(shares, quotas, strict=True))
    above = [quota - int(quota) for share, quota in zip(shares, quotas, strict=True) if share > quota]
    below = [quota - int(quota) for share, quota in zip(shares, quotas, strict=True) if share < quota]
    assert not above or not below or min(above) >= max(below)


@given(cases(), st.floats(-3, 3, width=32))
def test_threshold_counts_stay_within_their_bounds(case: Any, threshold: float) -> None:
    scores, _, budgets = case
    for group, b in zip(scores, budgets, strict=True):
        for row, count in zip(group.tolist(), count_above(group, torch.tensor(threshold), b), strict=True):
            above = sum(score > threshold for score in row)
            assert count.selected == min(max(above, b.least), b.most)
            assert count.visible == count.selected * b.average.visible // b.average.selected


@given(cases())
def test_quantile_lies_above_all_but_the_budget(case: Any) -> None:
    scores, _, budgets = case
    count = sum(len(group) * b.average.selected for group, b in zip(scores, budgets, strict=True))
    everything = sorted((score for group in scores for score in group.flatten().tolist()), reverse=True)
    quantile = float(upper_quantile(scores, budgets))
    if count == len(everything):
        assert quantile < everything[-1]
    else:
        assert quantile == everything[count]
    above = sum(score > quantile for score in everything)
    assert above <= count
    if len(set(everything)) == len(everything):
        assert above == count


@pytest.mark.gpu
@given(cases())
def test_budgets_are_the_same_on_cpu_and_gpu(case: Any) -> None:
    scores, draws, budgets = case
    moved = [group.cuda() for group in scores]
    assert share_budget(moved, [draw.cuda() for draw in draws], budgets) == share_budget(scores, draws, budgets)
    assert float(upper_quantile(moved, budgets)) == float(upper_quantile(scores, budgets))
