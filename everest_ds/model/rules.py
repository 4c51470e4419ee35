"""A selection rule: a strategy and its ratios, the one interface by which models choose tokens.

Place in the flow: clips' importance_BN (or nothing), their grid and noise -> Selection, or the tokens that a
classifier keeps. A rule holds no state and draws nothing: the same inputs give the same choice on any device.
Axes: B clips, N tokens of a clip, S noise values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everest_ds.config import FinetuneSelectionConfig
from everest_ds.counts import (
    ClipCounts,
    DistanceName,
    OrderName,
    StrategyName,
    TargetName,
    count_kept,
    count_of_cell,
    count_selection,
    noise_length,
)
from everest_ds.geometry import TokenGrid
from everest_ds.model import selection
from everest_ds.model.packing import TokenIndex
from everest_ds.model.selection import Selection


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """Which tokens are kept of a clip.

    Attributes:
        strategy: rero, random, tube, running_cell or all.
        order: Whether rero takes the most or the least changing tokens.
        distance: What change is measured by.
        selected_ratio: rho_pre, share of a clip's tokens; a classifier keeps these.
        visible_ratio: Share of a clip's tokens that the encoder sees in pre-training.
        targets: Whether the decoder predicts what is selected and not visible, or all that is selected.
        num_steps: Time steps to choose of the clip's by change, before anything else (Sec. 4.2); None takes all.
    """

    strategy: StrategyName = "rero"
    order: OrderName = "descending"
    distance: DistanceName = "l2"
    selected_ratio: float = 0.3
    visible_ratio: float = 0.1
    targets: TargetName = "masked"
    num_steps: int | None = None

    def counts(self, grid: TokenGrid) -> ClipCounts:
        """Return the tokens of a clip in pre-training, where all clips keep equally many."""
        return count_selection(self.strategy, grid, self.selected_ratio, self.visible_ratio, self.targets)

    def num_kept(self, grid: TokenGrid) -> int:
        """Return the tokens of a clip that a classifier keeps."""
        return count_kept(self.strategy, grid, self.selected_ratio)

    def noise_length(self, grid: TokenGrid) -> int:
        """Return the noise values of a clip for `select`."""
        return noise_length(self.strategy, grid, self.counts(grid).selected)

    def keep_noise_length(self, grid: TokenGrid) -> int:
        """Return the noise values of a clip for `keep`: none where nothing is drawn."""
        if self.strategy == "rero" or self.num_kept(grid) == grid.num_tokens:
            return 0
        return 1 if self.strategy == "running_cell" else noise_length(self.strategy, grid, 0)

    def ranks_to_keep(self, grid: TokenGrid) -> bool:
        """Return whether `keep` goes by importance: rero that does not keep all tokens."""
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
            noise_BS: Uniform in [0, 1), `noise_length` values a clip; with ``counts`` as many as a clip selects at
                most.
            importance_BN: How much each token changed; rero alone needs it.
            counts: Tokens of each clip where they differ; rero alone can take them.

        Raises:
            ValueError: Noise, importance or counts that the strategy cannot do with.
        """
        both = self.targets == "selected"
        own = self.counts(grid)
        if self.strategy == "rero":
            if importance_BN is None:
                raise ValueError("strategy=rero chooses by importance; none is given")
            if counts is not None:
                return selection.select_rero_varying(
                    importance_BN, noise_BS, counts, keep_visible_as_target=both, order=self.order
                )
            _require_width(noise_BS, own.selected)
            return selection.select_rero(
                importance_BN, noise_BS, num_visible=own.visible, keep_visible_as_target=both, order=self.order
            )
        if counts is not None:
            raise ValueError(f"strategy={self.strategy} keeps equally many tokens of every clip")
        _require_width(noise_BS, self.noise_length(grid))
        if self.strategy == "running_cell":
            of_cell = count_of_cell(grid, self.selected_ratio)
            return selection.select_running_cells(noise_BS, grid, own, of_cell, keep_visible_as_target=both)
        order_BN = self._order_by_noise(grid, noise_BS)
        return selection.select_first(order_BN, own.selected, own.visible, keep_visible_as_target=both)

    def keep(
        self,
        grid: TokenGrid,
        num_clips: int,
        device: torch.device,
        noise_BS: Tensor | None = None,
        importance_BN: Tensor | None = None,
    ) -> TokenIndex:
        """Choose what a classifier keeps.

        Args:
            grid: The clips' token grid.
            num_clips: Clips.
            device: Where they are.
            noise_BS: Uniform in [0, 1), `keep_noise_length` values a clip.
            importance_BN: How much each token changed; rero that does not keep all tokens needs it.

        Raises:
            ValueError: Noise or importance is missing, or of another shape.
        """
        count = self.num_kept(grid)
        if self.ranks_to_keep(grid):
            if importance_BN is None:
                raise ValueError("strategy=rero chooses by importance; none is given")
            selection.require_count(count, grid.num_tokens, "tokens kept")
            return TokenIndex.of_equal_counts(selection.rank_by_importance(importance_BN, self.order)[:, :count])
        if count == grid.num_tokens:
            position_N = torch.arange(count, device=device)
            return TokenIndex.of_equal_counts(position_N.expand(num_clips, -1))
        if noise_BS is None or len(noise_BS) != num_clips:
            raise ValueError(f"strategy={self.strategy} draws tokens; it needs noise for {num_clips} clips")
        _require_width(noise_BS, self.keep_noise_length(grid))
        if self.strategy == "running_cell":
            of_cell = count_of_cell(grid, self.selected_ratio)
            kept_BN = selection.running_cells(noise_BS[:, -1], grid, of_cell)
            return TokenIndex.of_mask(kept_BN, [count] * num_clips)
        return TokenIndex.of_equal_counts(self._order_by_noise(grid, noise_BS)[:, :count])

    def _order_by_noise(self, grid: TokenGrid, noise_BS: Tensor) -> Tensor:
        if self.strategy == "tube":
            return selection.order_tubes(noise_BS, grid)
        return selection.order_at_random(noise_BS)


DEFAULT_RULE = SelectionRule()


def keep_rule(selection: FinetuneSelectionConfig) -> SelectionRule:
    """Return which tokens a classifier keeps."""
    return SelectionRule(
        strategy=selection.strategy,
        order=selection.order,
        distance=selection.distance,
        selected_ratio=selection.keep_ratio,
    )


def _require_width(noise_BS: Tensor, expected: int) -> None:
    if noise_BS.shape[1] != expected:
        raise ValueError(f"expected {expected} noise values a clip, got {noise_BS.shape[1]}")
