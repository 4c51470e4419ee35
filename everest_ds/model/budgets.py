"""How many tokens each clip keeps when clips compete for one budget, or when the number follows content.

Place in the flow: importance_BN of all clips of a micro-step -> counts of each clip -> `SelectionRule.select`.
The host reads the counts once a micro-step, because they are the lengths of packed rows. Clips may come in groups
of different grids.
Axes: B clips of a group, N their tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from everest_ds.tokens import ClipCounts, TargetName


@dataclass(frozen=True, kw_only=True)
class ClipBudget:
    """How many tokens a clip may keep.

    Attributes:
        average: What it would keep if all clips kept the same share.
        least: The fewest tokens that it may select.
        most: The most tokens that it may select.
        targets: Whether the decoder predicts what is selected and not visible, or all that is selected.
    """

    average: ClipCounts
    least: int
    most: int
    targets: TargetName = "masked"

    def with_selected(self, selected: int, visible: int) -> ClipCounts:
        """Return the counts of a clip from its selected and its visible tokens."""
        hidden = selected if self.targets == "selected" else selected - visible
        return ClipCounts(selected=selected, visible=visible, targets=hidden)


def share_budget(
    importance: Sequence[Tensor], draws: Sequence[Tensor], budgets: Sequence[ClipBudget]
) -> list[list[ClipCounts]]:
    """Share one budget among clips: the most important tokens of all clips are selected.

    The budget is the sum of the averages. Every clip first gets its ``least`` most important tokens. The rest of
    the budget goes to the most important tokens of all clips, up to ``most`` a clip. The visible tokens, in all as
    many as in the averages, are divided in proportion to the selected ones, rounded by largest remainder. So both
    totals are exact whatever the content, and a permutation of the clips permutes the counts.

    Args:
        importance: importance_BN of each group of clips; larger wins.
        draws: A uniform value for each clip of a group, (B,), which decides ties between clips.
        budgets: The budget of each group's clips.

    Returns:
        Counts of each clip of each group.
    """
    budget_of = [b for b, group in zip(budgets, importance, strict=True) for _ in range(len(group))]
    draw_B = torch.cat(list(draws))
    by_draw = torch.argsort(draw_B, stable=True)
    left = sum(b.average.selected - b.least for b in budget_of)
    width = max(b.most - b.least for b in budgets)
    # Each clip's scores after its `least` best ones, in descending order, padded with -inf.
    rest_BR = torch.cat([_rest(group, b, width) for group, b in zip(importance, budgets, strict=True)])
    # Transposed, so that among equal scores lower ranks win, then clips in the order of their draws.
    by_score = torch.argsort(rest_BR[by_draw].T.flatten(), descending=True, stable=True)
    won_B = torch.zeros_like(by_draw).index_add(0, by_score[:left] % len(by_draw), by_draw.new_ones(left))
    won_B = torch.empty_like(won_B).scatter(0, by_draw, won_B)
    selected = [b.least + extra for b, extra in zip(budget_of, won_B.tolist(), strict=True)]
    total_visible = sum(b.average.visible for b in budget_of)
    visible = apportion(total_visible, selected, by_draw.tolist())
    counts = (b.with_selected(*chosen) for b, *chosen in zip(budget_of, selected, visible, strict=True))
    return [[next(counts) for _ in range(len(group))] for group in importance]


def count_above(importance: Tensor, threshold: Tensor, budget: ClipBudget) -> list[ClipCounts]:
    """Let each clip of a group keep its tokens above a threshold, at least ``least`` and at most ``most``.

    The visible tokens' share of the selected ones is that of the average, rounded down. Clips are independent.
    """
    above = (importance > threshold).sum(dim=1).clamp(budget.least, budget.most).tolist()
    average = budget.average
    return [budget.with_selected(chosen, chosen * average.visible // average.selected) for chosen in above]


def upper_quantile(importance: Sequence[Tensor], budgets: Sequence[ClipBudget]) -> Tensor:
    """Return the threshold that as many tokens of these clips exceed as their averages select; a scalar.

    Fewer tokens exceed it if some are equal to it. If all tokens are selected, it is below all of them.
    """
    count = sum(len(group) * b.average.selected for group, b in zip(importance, budgets, strict=True))
    falling = torch.cat([group.flatten() for group in importance]).sort(descending=True).values
    return falling[count] if count < len(falling) else falling[-1] - 1


def apportion(total: int, weights: Sequence[int], priority: Sequence[int]) -> list[int]:
    """Divide a whole number in proportion to weights, by largest remainder.

    Args:
        total: The number.
        weights: At least 0, not all 0.
        priority: All indices of ``weights``; earlier ones win where remainders tie.
    """
    whole = sum(weights)
    shares = [divmod(total * weight, whole) for weight in weights]
    ranked = sorted(priority, key=lambda i: -shares[i][1])  # sorted is stable
    first = set(ranked[: total - sum(share for share, _ in shares)])
    return [share + (i in first) for i, (share, _) in enumerate(shares)]


def _rest(importance_BN: Tensor, budget: ClipBudget, width: int) -> Tensor:
    falling = importance_BN.sort(dim=1, descending=True).values[:, budget.least : budget.most]
    return F.pad(falling, (0, width - falling.shape[1]), value=float("-inf"))
