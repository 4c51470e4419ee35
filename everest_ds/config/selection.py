"""Configuration of the token selection, in pre-training and in fine-tuning."""

from dataclasses import dataclass
from typing import Literal

from everest_ds.config.sections import require
from everest_ds.errors import UserError
from everest_ds.tokens import DistanceName, OrderName, StrategyName, TargetName

BudgetName = Literal["clip", "batch", "threshold"]

QUANTILE_DECAY = 0.99


@dataclass(frozen=True, kw_only=True)
class TokenChoiceConfig:
    """How tokens are chosen."""

    strategy: StrategyName = "rero"
    """rero: by change over time (EVEREST); random: ST-MAE; tube: VideoMAE, the same positions in all time steps;
    running_cell: VideoMAE V2, a tube for the encoder and running cells for the decoder; all: every token (needs a
    ratio of 1)."""
    order: OrderName = "descending"
    """With rero: keep the tokens that change most (descending) or least (ascending, Table 16)."""
    distance: DistanceName = "l2"
    """Distance between a token and the previous token at the same position (Table 9)."""

    def __post_init__(self) -> None:
        if self.strategy != "rero" and self.order != "descending":
            raise UserError(
                f"selection.order={self.order} has no effect with selection.strategy={self.strategy}; remove it, "
                "or use selection.strategy=rero"
            )
        if not self.measures_change and self.distance != "l2":
            raise UserError(
                f"selection.distance={self.distance} has no effect with selection.strategy={self.strategy}; remove "
                "it, or use selection.strategy=rero"
            )

    @property
    def measures_change(self) -> bool:
        """Whether tokens are compared with those of the time step before."""
        return self.strategy == "rero"

    def _require_ratio(self, name: str) -> None:
        """Raise UserError for a ratio that the strategy cannot keep in any clip."""
        ratio = getattr(self, name)
        require(0 < ratio <= 1, f"selection.{name}", ratio, "a share of the clip's tokens in (0, 1]")
        if self.strategy == "all" and ratio != 1:
            raise UserError(
                f"selection.{name}={ratio} must be 1 with selection.strategy=all, which keeps every token; or use "
                "selection.strategy=random"
            )
        if self.strategy == "running_cell" and ratio not in (0.25, 0.5, 0.75):
            raise UserError(
                f"selection.{name}={ratio} must be 0.25, 0.5 or 0.75 with selection.strategy=running_cell: one, "
                "two or three of each cell's four positions"
            )


@dataclass(frozen=True, kw_only=True)
class SelectionConfig(TokenChoiceConfig):
    """Which tokens (paper Sec. 4.1) of which frames (Sec. 4.2) are kept in pre-training."""

    selected_ratio: float = 0.3
    """rho_pre: share of a clip's tokens that is selected; the decoder sees the selected tokens."""
    visible_ratio: float = 0.1
    """rho_pre * rho_post: share of a clip's tokens that the encoder sees, drawn from the selected ones."""
    targets: TargetName = "masked"
    """masked: reconstruct the selected tokens that are not visible (official code); selected: reconstruct all
    selected tokens (Eq. 3)."""
    budget: BudgetName = "clip"
    """clip: every clip keeps selected_ratio; batch: the clips of a micro-step, on all processes, share one budget,
    which goes to the most changing tokens; threshold: a clip keeps the tokens above a running quantile of
    importance, so the cost depends on the content."""
    floor: float | None = None
    """With budget batch or threshold: smallest share that a clip keeps; None for half of selected_ratio."""
    ceiling: float | None = None
    """With budget batch or threshold: largest share that a clip keeps; None for twice selected_ratio."""
    quantile_decay: float = QUANTILE_DECAY
    """With budget threshold: decay of the running quantile per micro-step."""
    alpha: float = 1.0
    """Frame selection: choose a clip's frames from alpha times as many candidates, by change (Sec. 4.2); 1 turns it
    off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_ratio("selected_ratio")
        require(
            0 < self.visible_ratio <= 1, "selection.visible_ratio", self.visible_ratio,
            "a share of the clip's tokens in (0, 1]",
        )  # fmt: skip
        if self.visible_ratio > self.selected_ratio:
            raise UserError(
                f"selection.visible_ratio={self.visible_ratio} is above selection.selected_ratio="
                f"{self.selected_ratio}, but visible tokens are drawn from the selected ones; lower it"
            )
        require(self.alpha >= 1, "selection.alpha", self.alpha, "at least 1 (1 chooses no frames)")
        self._check_budget()

    @property
    def varies(self) -> bool:
        """Whether clips may keep different numbers of tokens."""
        return self.budget != "clip"

    @property
    def least_ratio(self) -> float:
        """Smallest share of its tokens that a clip keeps."""
        if not self.varies:
            return self.selected_ratio
        return self.selected_ratio / 2 if self.floor is None else self.floor

    @property
    def most_ratio(self) -> float:
        """Largest share of its tokens that a clip keeps."""
        if not self.varies:
            return self.selected_ratio
        return min(1.0, 2 * self.selected_ratio) if self.ceiling is None else self.ceiling

    @property
    def measures_change(self) -> bool:
        """Whether tokens are compared with those of the time step before, to choose tokens or frames."""
        return self.strategy == "rero" or self.alpha > 1

    def _check_budget(self) -> None:
        """Check the budget and the fields that depend on it."""
        for name in ("floor", "ceiling"):
            value = getattr(self, name)
            if value is None:
                continue
            require(0 < value <= 1, f"selection.{name}", value, "a share of the clip's tokens in (0, 1]")
            if not self.varies:
                raise UserError(
                    f"selection.{name}={value} has no effect with selection.budget=clip; remove it, or use "
                    "selection.budget=batch or threshold"
                )
        require(0 <= self.quantile_decay < 1, "selection.quantile_decay", self.quantile_decay, "in [0, 1)")
        if self.quantile_decay != QUANTILE_DECAY and self.budget != "threshold":
            raise UserError(
                f"selection.quantile_decay={self.quantile_decay} has no effect with selection.budget={self.budget}"
                "; remove it, or use selection.budget=threshold"
            )
        if self.varies and self.strategy != "rero":
            raise UserError(
                f"selection.budget={self.budget} needs the importance of tokens, which selection.strategy="
                f"{self.strategy} does not use; use selection.strategy=rero or selection.budget=clip"
            )
        if not self.least_ratio <= self.selected_ratio <= self.most_ratio:
            raise UserError(
                f"expected floor <= selected_ratio <= ceiling, got selection.floor={self.least_ratio}, "
                f"selection.selected_ratio={self.selected_ratio}, selection.ceiling={self.most_ratio}"
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneSelectionConfig(TokenChoiceConfig):
    """Which tokens are kept in fine-tuning (paper Sec. 4.1)."""

    keep_ratio: float = 0.6
    """Share of a clip's tokens that is kept (the paper's rho); 1 keeps all tokens, like VideoMAE."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_ratio("keep_ratio")
