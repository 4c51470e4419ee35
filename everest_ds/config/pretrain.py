"""The configuration of a pre-training run (paper Table 7)."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from everest_ds.config.base import Config
from everest_ds.config.sections import DataConfig, ModelConfig, require
from everest_ds.errors import UserError
from everest_ds.geometry import ratio_to_count

TargetName = Literal["masked", "selected"]


@dataclass(frozen=True, kw_only=True)
class PretrainDataConfig(DataConfig):
    """Which videos, and how a clip is cut from one."""

    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    """MultiScaleCrop: crop edges as shares of the shorter side."""

    def __post_init__(self) -> None:
        """Check each field by itself."""
        super().__post_init__()
        scales_ok = bool(self.crop_scales) and all(0 < scale <= 1 for scale in self.crop_scales)
        require(scales_ok, "data.crop_scales", self.crop_scales, "one or more shares in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class PretrainModelConfig(ModelConfig):
    """The encoder-decoder."""

    decoder_depth: int = 4
    """Decoder blocks; the paper's costs are those of 4, VideoMAE's own large and huge models have 12."""

    def __post_init__(self) -> None:
        """Check each field by itself."""
        super().__post_init__()
        require(self.decoder_depth >= 1, "model.decoder_depth", self.decoder_depth, "at least 1")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which tokens are kept (paper Sec. 4.1)."""

    selected_ratio: float = 0.3
    """rho_pre: share of a clip's tokens that ReRo selects; the decoder sees these."""
    visible_ratio: float = 0.1
    """rho_pre * rho_post: share of a clip's tokens that the encoder sees, drawn from the selected ones."""
    targets: TargetName = "masked"
    """Reconstruct the selected tokens that are not visible (official code) or all selected ones (Eq. 3)."""

    def __post_init__(self) -> None:
        """Check each ratio, and one against the other."""
        for name in ("selected_ratio", "visible_ratio"):
            ratio = getattr(self, name)
            require(0 < ratio <= 1, f"selection.{name}", ratio, "a share of the clip's tokens in (0, 1]")
        if self.visible_ratio > self.selected_ratio:
            raise UserError(
                f"selection.visible_ratio={self.visible_ratio} is above selection.selected_ratio="
                f"{self.selected_ratio}; the visible tokens are drawn from the selected ones: lower it"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """One pre-training run, resolved: what RUN/config.json holds."""

    task: Annotated[Literal["pretrain"], tyro.conf.Suppress] = "pretrain"
    """What is trained."""
    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    model: PretrainModelConfig = field(default_factory=PretrainModelConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)

    def __post_init__(self) -> None:
        """Check what depends on several sections at once."""
        super().__post_init__()
        self._require_two_steps()
        if self.num_visible < 1:
            raise UserError(
                f"selection.visible_ratio={self.selection.visible_ratio} of {self.grid.num_tokens} tokens keeps "
                f"none; use at least {1 / self.grid.num_tokens:.4g}"
            )
        if self.selection.targets == "masked" and self.num_visible == self.num_selected:
            raise UserError(
                f"selection.visible_ratio={self.selection.visible_ratio} shows all {self.num_selected} selected "
                "tokens to the encoder and leaves none to reconstruct; lower it, or use "
                "selection.targets=selected"
            )

    @property
    def num_selected(self) -> int:
        """Tokens of a clip that ReRo selects."""
        return ratio_to_count(self.grid.num_tokens, self.selection.selected_ratio)

    @property
    def num_visible(self) -> int:
        """Tokens of a clip that the encoder sees."""
        return ratio_to_count(self.grid.num_tokens, self.selection.visible_ratio)

    @property
    def num_targets(self) -> int:
        """Tokens of a clip that the decoder predicts."""
        hidden = self.num_selected - self.num_visible
        return hidden if self.selection.targets == "masked" else self.num_selected

    @property
    def tokens(self) -> str:
        """What becomes of a clip's tokens, in words."""
        return (
            f"{super().tokens}, {self.num_selected} selected, {self.num_visible} visible, "
            f"{self.num_targets} targets"
        )
