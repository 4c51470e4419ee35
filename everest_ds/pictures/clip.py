"""A clip, its importance and its kept tokens, as arrays to draw.

Axes: T frames, H W pixels, C colour, N tokens, S visible, R predicted.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from everest_ds.tokens import TokenGrid

DROPPED, SEEN, HIDDEN, BOTH = 0, 1, 2, 3
"""Roles of a token: not kept; visible; predicted; both visible and predicted (selection.targets=selected)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenChoice:
    """The tokens that one selection keeps of a clip.

    Attributes:
        label: Name of the selection, as drawn.
        visible_S: Positions that the encoder sees, int64.
        predicted_R: Positions that the decoder predicts, int64; empty for a classifier.
        reconstruction_THWC: The clip with predicted tokens replaced by the model's predictions, uint8; None if the
            model predicted nothing.
        loss: Mean squared error over the predicted tokens' standardised pixels.
    """

    label: str
    visible_S: NDArray[np.int64]
    predicted_R: NDArray[np.int64]
    reconstruction_THWC: NDArray[np.uint8] | None = None
    loss: float | None = None

    def roles(self, grid: TokenGrid) -> NDArray[np.uint8]:
        """Return the role of every token, uint8 of shape (time, rows, cols)."""
        roles_N = np.zeros(grid.num_tokens, np.uint8)
        roles_N[self.visible_S] |= SEEN
        roles_N[self.predicted_R] |= HIDDEN
        return roles_N.reshape(grid.time, grid.rows, grid.cols)

    def describe(self, grid: TokenGrid) -> str:
        """Return the counts of visible, predicted and kept tokens as text."""
        seen, hidden = len(self.visible_S), len(self.predicted_R)
        kept = len(np.union1d(self.visible_S, self.predicted_R))
        share = f"of {grid.num_tokens} tokens ({kept / grid.num_tokens:.1%} kept)"
        return f"{seen} visible + {hidden} predicted {share}" if hidden else f"{seen} kept {share}"


@dataclass(frozen=True, kw_only=True, eq=False)
class PicturedClip:
    """A clip with the importance of its tokens and the tokens that each selection keeps.

    Attributes:
        frames_THWC: Pixels, uint8.
        grid: Token grid of the clip; T is a multiple of ``grid.time``, H and W of rows and columns.
        importance_N: Importance of each token, float32; None if tokens were not ranked.
        no_change: A token whose importance is at most this does not change.
        choices: Kept tokens, one entry a selection.
        times_s: Time of each frame in the video, in seconds; None if unknown.
        numbers: Index of each frame in the video; None if unknown.

    Raises:
        ValueError: Shapes do not match.
    """

    frames_THWC: NDArray[np.uint8]
    grid: TokenGrid
    choices: tuple[TokenChoice, ...]
    importance_N: NDArray[np.float32] | None = None
    no_change: float = 0.0
    times_s: NDArray[np.float64] | None = None
    numbers: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        grid, shape = self.grid, self.frames_THWC.shape
        fits = len(shape) == 4 and shape[3] == 3 and self.frames_THWC.dtype == np.uint8
        if not fits or shape[0] % grid.time or shape[1] % grid.rows or shape[2] % grid.cols:
            raise ValueError(f"expected uint8 frames (T, H, W, 3) that divide into {grid}, got {shape}")
        if self.importance_N is not None and self.importance_N.shape != (grid.num_tokens,):
            raise ValueError(f"expected importance of {grid.num_tokens} tokens, got {self.importance_N.shape}")
        for name, values in (("times_s", self.times_s), ("numbers", self.numbers)):
            if values is not None and values.shape != shape[:1]:
                raise ValueError(f"expected {name} of {shape[0]} frames, got {values.shape}")

    @property
    def tubelet_size(self) -> int:
        """Frames of a time step."""
        return len(self.frames_THWC) // self.grid.time

    @cached_property
    def heat_limits(self) -> tuple[float, float]:
        """Importance that is drawn darkest and brightest: the minimum and the 99.5th percentile."""
        if self.importance_N is None:
            return 0.0, 1.0
        low, high = float(self.importance_N.min()), float(np.quantile(self.importance_N, 0.995))
        return low, high if high > low else low + 1.0

    def count_still(self, choice: TokenChoice) -> int:
        """Return how many unchanging tokens a choice keeps after it has kept all changing ones.

        Unchanging tokens tie, and the selection takes the earliest of them. The result is 0 if a changing token is
        dropped, and if all tokens are kept.
        """
        kept = np.union1d(choice.visible_S, choice.predicted_R)
        if self.importance_N is None or len(kept) == len(self.importance_N):
            return 0
        still_N = self.importance_N <= self.no_change
        changes_are_kept = np.isin(np.flatnonzero(~still_N), kept).all()
        return int(still_N[kept].sum()) if changes_are_kept else 0

    def label_of_frame(self, frame: int) -> str:
        """Return a frame's time in the video as text; its index if times are unknown."""
        if self.times_s is not None:
            return f"{self.times_s[frame]:.2f} s"
        return f"frame {frame if self.numbers is None else self.numbers[frame]}"
