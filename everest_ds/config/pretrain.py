"""The configuration of a pre-training run (paper Table 7)."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from everest_ds.config.base import Config
from everest_ds.config.sections import DataConfig, ModelConfig, require, require_counts
from everest_ds.config.selection import SelectionConfig
from everest_ds.errors import UserError
from everest_ds.tokens import (
    ClipCounts,
    TokenGrid,
    bound_counts,
    count_candidate_steps,
    count_selection,
    ratio_to_count,
)


@dataclass(frozen=True, kw_only=True)
class PretrainDataConfig(DataConfig):
    """Which videos are read, and how clips are cut."""

    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """MultiScaleCrop: crop edges as shares of the shorter side."""
    resize: Literal["fast", "compat", "device"] = "fast"
    """How crops are resized. fast: torch, on bytes; compat: PIL, with the official code's pixels; device: like
    fast, but on the training device, which relieves the loader workers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        scales_ok = bool(self.crop_scales) and all(0 < scale <= 1 for scale in self.crop_scales)
        require(scales_ok, "data.crop_scales", self.crop_scales, "one or more shares in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class PretrainModelConfig(ModelConfig):
    """The encoder-decoder."""

    decoder_depth: int = 4
    """Decoder blocks; the paper's costs are for 4, VideoMAE's own large and huge models have 12."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts("model", self, "decoder_depth")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """Complete configuration of one pre-training run: the content of RUN/config.json."""

    task: Annotated[Literal["pretrain"], tyro.conf.Suppress] = "pretrain"
    """Task of the run."""
    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    model: PretrainModelConfig = field(default_factory=PretrainModelConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection.measures_change:
            self._require_two_steps()
        selection, num_tokens = self.selection, self.grid.num_tokens
        if selection.alpha > 1 and self.candidate_steps == self.grid.time:
            raise UserError(
                f"selection.alpha={selection.alpha} x {self.grid.time} time steps adds no candidates; use at least "
                f"{1 + 1 / self.grid.time:.4g}, or 1 to turn frame selection off"
            )
        if self.num_visible < 1:
            raise UserError(
                f"selection.visible_ratio={selection.visible_ratio} of {num_tokens} tokens keeps none; use at "
                f"least {1 / num_tokens:.4g}"
            )
        if self.num_targets < 1:
            raise UserError(
                f"selection.visible_ratio={selection.visible_ratio} shows all {self.num_selected} selected tokens "
                "to the encoder and leaves none to reconstruct; lower it, or use selection.targets=selected"
            )
        least = self._bound(selection.least_ratio, upper=False)
        if least.visible < 1 or least.targets < 1:
            raise UserError(
                f"selection.floor={selection.least_ratio} keeps {least.selected} of {num_tokens} tokens, too few "
                "for one visible and one target token; raise it"
            )

    @property
    def candidate_steps(self) -> int:
        """Time steps of the candidate frames; the clip's own without frame selection."""
        return count_candidate_steps(self.grid.time, self.selection.alpha)

    @property
    def candidate_frames(self) -> int:
        """Number of frames read from a video: the candidates of frame selection."""
        return self.candidate_steps * self.model.tubelet_size

    @property
    def candidate_grid(self) -> TokenGrid:
        """The token grid of the candidate frames."""
        return TokenGrid(time=self.candidate_steps, rows=self.grid.rows, cols=self.grid.cols)

    @property
    def counts(self) -> ClipCounts:
        """Token counts of a clip; of the average clip if clips may differ (`SelectionConfig.budget`)."""
        selection = self.selection
        return count_selection(
            selection.strategy, self.grid, selection.selected_ratio, selection.visible_ratio, selection.targets
        )

    @property
    def most(self) -> ClipCounts:
        """Largest token counts of a clip."""
        return self._bound(self.selection.most_ratio, upper=True)

    @property
    def least_selected(self) -> int:
        """Smallest number of selected tokens of a clip."""
        return self._bound(self.selection.least_ratio, upper=False).selected

    @property
    def num_selected(self) -> int:
        """Tokens of a clip that are selected."""
        return self.counts.selected

    @property
    def num_visible(self) -> int:
        """Tokens of a clip that the encoder sees."""
        return self.counts.visible

    @property
    def num_targets(self) -> int:
        """Tokens of a clip that the decoder predicts."""
        return self.counts.targets

    @property
    def tokens(self) -> str:
        """Token counts of a clip, in words."""
        chosen = f" of {self.candidate_frames} candidate frames" if self.candidate_steps > self.grid.time else ""
        counts = (
            f"{super().tokens}{chosen}, {self.num_selected} selected, {self.num_visible} visible, "
            f"{self.num_targets} targets"
        )
        if not self.selection.varies:
            return counts
        most = self.most
        return f"{counts} on average; at most {most.selected}, {most.visible}, {most.targets}"

    def _bound(self, ratio: float, *, upper: bool) -> ClipCounts:
        if not self.selection.varies:
            return self.counts
        selected = ratio_to_count(self.grid.num_tokens, ratio)
        return bound_counts(self.counts, selected, self.selection.targets, upper=upper)
