"""Which tokens the encoder sees and which the decoder predicts: every strategy as a small pure function.

Place in the flow: importance_BN or a grid, and noise -> Selection(visible, target) -> gathered pixels ->
packed embeddings. `SelectionRule` combines a strategy and its ratios; models choose tokens only through it.
Nothing here synchronises with the device. Clips are independent: a permutation of the clips permutes the result.
Axes: B clips, N tokens of a clip, J of one time step, S selected tokens of a clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everest_ds.config import FinetuneSelectionConfig
from everest_ds.model.packing import TokenSet
from everest_ds.tokens import (
    CELL_EDGE,
    CELL_TOKENS,
    ClipCounts,
    DistanceName,
    OrderName,
    StrategyName,
    TargetName,
    TokenGrid,
    count_cell_positions,
    count_kept,
    count_selection,
    noise_length,
)


@dataclass(frozen=True)
class Selection:
    """The tokens that the encoder sees and those that the decoder predicts."""

    visible: TokenSet
    target: TokenSet

    def __post_init__(self) -> None:
        """Check that both are of the same number of clips."""
        clips = len(self.visible.packing.lengths), len(self.target.packing.lengths)
        if clips[0] != clips[1]:
            raise ValueError(f"visible tokens are of {clips[0]} clips, target tokens of {clips[1]}")

    @classmethod
    def join(cls, parts: "Sequence[Selection]") -> "Selection":
        """Concatenate the clips of several batches."""
        visible = TokenSet.join([part.visible for part in parts])
        return cls(visible, TokenSet.join([part.target for part in parts]))


def rank_by_importance(importance_BN: Tensor, order: OrderName = "descending") -> Tensor:
    """Return each clip's positions from the most to the least important, or the other way, (B, N) int64.

    Where importance is equal, lower positions come first, in either order.

    Differs from the official code: its sort is unstable, and 10 to 14 % of the ranks differ between runs.
    """
    return torch.argsort(importance_BN, dim=1, descending=order == "descending", stable=True)


def select_rero(
    importance_BN: Tensor,
    noise_BS: Tensor,
    *,
    num_visible: int,
    keep_visible_as_target: bool = False,
    order: OrderName = "descending",
) -> Selection:
    """Redundancy-robust selection: keep the S most important tokens; random ones of them are visible.

    Args:
        importance_BN: How much each token changed (`model.importance`).
        noise_BS: Uniform noise in [0, 1). Column r belongs to the token of rank r, not to a position.
        num_visible: How many selected tokens are visible: those with the lowest noise.
        keep_visible_as_target: Targets are all selected tokens (Eq. 3) instead of those that are not visible.
        order: ascending selects the least important tokens (Table 16).

    Raises:
        ValueError: More selected than tokens, more visible than selected, or no target left.

    Source: EVEREST Sec. 4.1. The noise is used as in the official code, which reconstructs the masked tokens only.
    """
    num_selected = noise_BS.shape[1]
    require_count(num_selected, importance_BN.shape[1], "the noise's width (tokens selected)")
    _require_clips(noise_BS, importance_BN)
    selected_BS = rank_by_importance(importance_BN, order)[:, :num_selected]
    shuffled_BS = selected_BS.gather(1, torch.argsort(noise_BS, dim=1, stable=True))
    return select_first(shuffled_BS, num_selected, num_visible, keep_visible_as_target=keep_visible_as_target)


def select_rero_varying(
    importance_BN: Tensor,
    noise_BS: Tensor,
    counts: Sequence[ClipCounts],
    *,
    keep_visible_as_target: bool = False,
    order: OrderName = "descending",
) -> Selection:
    """`select_rero` for clips that keep different numbers of tokens (`model.budgets`).

    ``noise_BS`` is at least as wide as the largest number of selected tokens; a clip that selects fewer ignores the
    rest of its noise.

    Raises:
        ValueError: Counts that do not fit: more selected than noise or tokens, or more visible than selected.
    """
    _require_clips(noise_BS, importance_BN)
    if len(counts) != len(importance_BN):
        raise ValueError(f"counts of {len(counts)} clips, importance of {len(importance_BN)}")
    for count in counts:
        require_count(count.selected, min(noise_BS.shape[1], importance_BN.shape[1]), "selected")
        require_count(count.visible, count.selected, "visible")
    device, widest = importance_BN.device, max(count.selected for count in counts)
    counts_B2 = torch.tensor([(count.selected, count.visible) for count in counts])
    selected_B1, visible_B1 = counts_B2.to(device, non_blocking=True)[:, :, None].unbind(1)
    column_S = torch.arange(widest, device=device)
    # Uniform noise is below 2, so ranks that a clip does not select come last.
    noise_BS = noise_BS[:, :widest].masked_fill(column_S >= selected_B1, 2.0)
    ranked_BS = rank_by_importance(importance_BN, order)[:, :widest]
    shuffled_BS = ranked_BS.gather(1, torch.argsort(noise_BS, dim=1, stable=True))
    first = 0 if keep_visible_as_target else visible_B1
    is_target_BS = (column_S >= first) & (column_S < selected_B1)
    nothing_BN = torch.zeros_like(importance_BN, dtype=torch.bool)
    return Selection(
        visible=TokenSet.from_mask(
            nothing_BN.scatter(1, shuffled_BS, column_S < visible_B1), [count.visible for count in counts]
        ),
        target=TokenSet.from_mask(
            nothing_BN.scatter(1, shuffled_BS, is_target_BS),
            [count.selected - (0 if keep_visible_as_target else count.visible) for count in counts],
        ),
    )


def select_first(
    order_BN: Tensor, num_selected: int, num_visible: int, *, keep_visible_as_target: bool = False
) -> Selection:
    """Select the first tokens of an order; the very first of them are visible.

    Raises:
        ValueError: More selected than tokens, more visible than selected, or no target left.
    """
    require_count(num_selected, order_BN.shape[1], "num_selected")
    require_count(num_visible, num_selected, "num_visible")
    target_BS = order_BN[:, (0 if keep_visible_as_target else num_visible) : num_selected]
    if target_BS.shape[1] == 0:
        raise ValueError(f"all {num_selected} selected tokens are visible; none is left to reconstruct")
    return Selection(TokenSet.from_positions(order_BN[:, :num_visible]), TokenSet.from_positions(target_BS))


def order_tubes(noise_BJ: Tensor, grid: TokenGrid) -> Tensor:
    """Return all tokens ordered by the noise of their place in a time step, (B, N) int64: VideoMAE's tubes.

    The first ``k * grid.time`` are the k places of lowest noise, each in all time steps.
    """
    step_T = torch.arange(grid.time, device=noise_BJ.device) * grid.tokens_per_step
    return (torch.argsort(noise_BJ, dim=1, stable=True)[:, :, None] + step_T).flatten(1)


def running_cells(phase_B: Tensor, grid: TokenGrid, num_of_cell: int) -> Tensor:
    """Return the tokens that running cells keep, (B, N) bool: some of each 2 x 2 cell, shifted by one each step.

    Args:
        phase_B: Uniform in [0, 1); chooses the token of a cell that the first step starts with.
        grid: The clip's tokens, rows and columns even.
        num_of_cell: Tokens kept of each cell in each step, 1 to 3.

    Source: VideoMAE V2's dual masking, running cell masking (Qing et al., 2023).
    """
    device = phase_B.device
    step_T, row_H, col_W = (torch.arange(n, device=device) for n in (grid.time, grid.rows, grid.cols))
    place_HW = CELL_EDGE * (row_H % CELL_EDGE)[:, None] + col_W % CELL_EDGE
    phase_B = (phase_B * CELL_TOKENS).long()
    turn_BTHW = phase_B[:, None, None, None] + step_T[:, None, None] + place_HW
    return (turn_BTHW % CELL_TOKENS < num_of_cell).flatten(1)


def select_running_cells(
    noise_BS: Tensor,
    grid: TokenGrid,
    counts: ClipCounts,
    num_of_cell: int,
    *,
    keep_visible_as_target: bool = False,
) -> Selection:
    """Dual masking: the encoder sees tubes, the decoder predicts the tokens of running cells.

    Args:
        noise_BS: Uniform in [0, 1): a value for each token of a time step, then the cells' phase.
        grid: Rows and columns even, time steps in fours.
        counts: Tokens selected by the cells, visible in tubes, and predicted.
        num_of_cell: See `running_cells`.
        keep_visible_as_target: Targets are all tokens of the cells instead of those that are not visible.

    Source: VideoMAE V2 (Wang et al., 2023), whose loss leaves out the tokens that the encoder sees.
    """
    visible_BS = order_tubes(noise_BS[:, :-1], grid)[:, : counts.visible]
    target_BN = running_cells(noise_BS[:, -1], grid, num_of_cell)
    if not keep_visible_as_target:
        target_BN = target_BN.scatter(1, visible_BS, False)
    return Selection(
        visible=TokenSet.from_positions(visible_BS),
        target=TokenSet.from_mask(target_BN, [counts.targets] * len(noise_BS)),
    )


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """Which tokens are kept of a clip.

    Attributes:
        strategy: rero, random, tube, running_cell or all.
        order: Whether rero takes the most or the least changing tokens.
        distance: How rero measures change.
        selected_ratio: rho_pre, share of a clip's tokens that is selected; a classifier keeps these.
        visible_ratio: Share of a clip's tokens that the encoder sees in pre-training.
        targets: Whether the decoder predicts what is selected and not visible, or all that is selected.
        num_steps: Time steps to choose by change before tokens are selected (Sec. 4.2); None keeps all.
    """

    strategy: StrategyName = "rero"
    order: OrderName = "descending"
    distance: DistanceName = "l2"
    selected_ratio: float = 0.3
    visible_ratio: float = 0.1
    targets: TargetName = "masked"
    num_steps: int | None = None

    def counts(self, grid: TokenGrid) -> ClipCounts:
        """Return the token counts of a clip in pre-training, if all clips keep equally many."""
        return count_selection(self.strategy, grid, self.selected_ratio, self.visible_ratio, self.targets)

    def num_kept(self, grid: TokenGrid) -> int:
        """Return how many tokens of a clip a classifier keeps."""
        return count_kept(self.strategy, grid, self.selected_ratio)

    def noise_length(self, grid: TokenGrid) -> int:
        """Return how many noise values `select` needs for a clip."""
        return noise_length(self.strategy, grid, self.counts(grid).selected)

    def keep_noise_length(self, grid: TokenGrid) -> int:
        """Return how many noise values `keep` needs for a clip; 0 if nothing is drawn."""
        if self.strategy == "rero" or self.num_kept(grid) == grid.num_tokens:
            return 0
        return 1 if self.strategy == "running_cell" else noise_length(self.strategy, grid, 0)

    def ranks_to_keep(self, grid: TokenGrid) -> bool:
        """Return whether `keep` needs importance: rero that does not keep all tokens."""
        return self.strategy == "rero" and self.num_kept(grid) < grid.num_tokens

    def select(
        self,
        grid: TokenGrid,
        noise_BS: Tensor,
        importance_BN: Tensor | None = None,
        counts: Sequence[ClipCounts] | None = None,
    ) -> Selection:
        """Choose visible and target tokens.

        Args:
            grid: The clips' token grid.
            noise_BS: Uniform in [0, 1), `noise_length` values a clip, or as many as the largest of ``counts``.
            importance_BN: For rero.
            counts: For rero: tokens of each clip, if clips differ.

        Raises:
            ValueError: Noise, importance or counts that do not fit the strategy.
        """
        both, own = self.targets == "selected", self.counts(grid)
        if self.strategy == "rero":
            if importance_BN is None:
                raise ValueError("strategy=rero chooses by importance; none is given")
            if counts is not None:
                return select_rero_varying(
                    importance_BN, noise_BS, counts, keep_visible_as_target=both, order=self.order
                )
            _require_width(noise_BS, own.selected)
            return select_rero(
                importance_BN, noise_BS, num_visible=own.visible, keep_visible_as_target=both, order=self.order
            )
        if counts is not None:
            raise ValueError(f"strategy={self.strategy} keeps equally many tokens of every clip")
        _require_width(noise_BS, self.noise_length(grid))
        if self.strategy == "running_cell":
            of_cell = count_cell_positions(grid, self.selected_ratio)
            return select_running_cells(noise_BS, grid, own, of_cell, keep_visible_as_target=both)
        order_BN = self._order_by_noise(grid, noise_BS)
        return select_first(order_BN, own.selected, own.visible, keep_visible_as_target=both)

    def keep(
        self,
        grid: TokenGrid,
        num_clips: int,
        device: torch.device,
        noise_BS: Tensor | None = None,
        importance_BN: Tensor | None = None,
    ) -> TokenSet:
        """Choose the tokens that a classifier keeps, by `keep_noise_length` noise values a clip or by importance.

        Raises:
            ValueError: Noise or importance is missing or has another shape.
        """
        count = self.num_kept(grid)
        if self.ranks_to_keep(grid):
            if importance_BN is None:
                raise ValueError("strategy=rero chooses by importance; none is given")
            require_count(count, grid.num_tokens, "tokens kept")
            return TokenSet.from_positions(rank_by_importance(importance_BN, self.order)[:, :count])
        if count == grid.num_tokens:
            return TokenSet.from_positions(torch.arange(count, device=device).expand(num_clips, -1))
        if noise_BS is None or len(noise_BS) != num_clips:
            raise ValueError(f"strategy={self.strategy} draws tokens and needs noise for {num_clips} clips")
        _require_width(noise_BS, self.keep_noise_length(grid))
        if self.strategy == "running_cell":
            kept_BN = running_cells(noise_BS[:, -1], grid, count_cell_positions(grid, self.selected_ratio))
            return TokenSet.from_mask(kept_BN, [count] * num_clips)
        return TokenSet.from_positions(self._order_by_noise(grid, noise_BS)[:, :count])

    def _order_by_noise(self, grid: TokenGrid, noise_BS: Tensor) -> Tensor:
        """Return all tokens ordered by their own noise (ST-MAE's random masking) or by their tube's, (B, N)."""
        if self.strategy == "tube":
            return order_tubes(noise_BS, grid)
        return torch.argsort(noise_BS, dim=1, stable=True)


DEFAULT_RULE = SelectionRule()


def keep_rule(selection: FinetuneSelectionConfig) -> SelectionRule:
    """Return which tokens a classifier keeps."""
    return SelectionRule(
        strategy=selection.strategy,
        order=selection.order,
        distance=selection.distance,
        selected_ratio=selection.keep_ratio,
    )


def require_count(count: int, available: int, name: str) -> None:
    """Refuse a number of tokens that is not between 1 and ``available``."""
    if not 1 <= count <= available:
        raise ValueError(f"{name}={count} must be between 1 and {available}")


def _require_clips(noise_BS: Tensor, importance_BN: Tensor) -> None:
    if noise_BS.shape[0] != importance_BN.shape[0]:
        raise ValueError(f"noise for {noise_BS.shape[0]} clips, importance for {importance_BN.shape[0]}")


def _require_width(noise_BS: Tensor, expected: int) -> None:
    if noise_BS.shape[1] != expected:
        raise ValueError(f"expected {expected} noise values a clip, got {noise_BS.shape[1]}")
