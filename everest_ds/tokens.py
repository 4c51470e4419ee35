"""Token counts in exact integers. All token counts of the project are computed here. A leaf without torch.

Place in the flow: a clip of T frames of H x W pixels -> a grid of tubelet tokens, time-major and then row-major ->
numbers of selected, visible and target tokens.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from everest_ds.errors import UserError

StrategyName = Literal["rero", "random", "tube", "running_cell", "all"]
OrderName = Literal["descending", "ascending"]
DistanceName = Literal["l2", "l1", "cosine", "cka"]
TargetName = Literal["masked", "selected"]

CELL_EDGE = 2
CELL_TOKENS = CELL_EDGE**2


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """The grid of tubelet tokens of one clip.

    Attributes:
        time: Time steps (tau in the paper), ``num_frames / tubelet_size``.
        rows: Token rows, ``height / patch_size``.
        cols: Token columns, ``width / patch_size``.
    """

    time: int
    rows: int
    cols: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one time step (J in the paper)."""
        return self.rows * self.cols

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole clip (N)."""
        return self.time * self.tokens_per_step

    @classmethod
    def of_clip(
        cls, *, num_frames: int, height: int, width: int, tubelet_size: int, patch_size: int
    ) -> "TokenGrid":
        """Return the grid of a clip, in frames and pixels.

        Raises:
            UserError: A length is not a positive multiple of its tubelet or patch edge.
        """
        return cls(
            time=_divide("num_frames", num_frames, "tubelet_size", tubelet_size),
            rows=_divide("image height", height, "patch_size", patch_size),
            cols=_divide("image width", width, "patch_size", patch_size),
        )


@dataclass(frozen=True, kw_only=True)
class ClipCounts:
    """Tokens of one clip.

    Attributes:
        selected: Tokens that the strategy selects.
        visible: Tokens that the encoder sees.
        targets: Tokens that the decoder predicts.
    """

    selected: int
    visible: int
    targets: int


def ratio_to_count(num_tokens: int, ratio: float) -> int:
    """Return ``floor(num_tokens * ratio)`` for the ratio as a decimal.

    0.3 is three tenths, not the nearest binary number: 1568 tokens give 470 at 0.3, 156 at 0.1 and 940 at 0.6.

    Differs from the official code: it computes ``int((1 - masked) * num_tokens)`` in floats, which loses a
    token at some sizes (``(1 - 0.7) * 10`` is 2.99...).

    Raises:
        UserError: The ratio is outside (0, 1].
    """
    return int(num_tokens * _exact_share(ratio))


def count_kept(strategy: StrategyName, grid: TokenGrid, ratio: float) -> int:
    """Return how many of a clip's tokens a strategy keeps at a ratio.

    rero and random: ``floor(tokens * ratio)``. tube and running_cell: the same number in every time step. all:
    every token.

    Raises:
        UserError: The ratio is outside (0, 1], or not possible with the strategy.
    """
    if strategy == "tube":
        return grid.time * count_tube_positions(grid, ratio)
    if strategy == "running_cell":
        return grid.num_tokens * count_cell_positions(grid, ratio) // CELL_TOKENS
    if strategy == "all" and ratio != 1:
        raise UserError(f"strategy=all keeps every token, but its ratio is {ratio}; set the ratio to 1")
    return ratio_to_count(grid.num_tokens, ratio)


def count_tube_positions(grid: TokenGrid, ratio: float) -> int:
    """Return how many positions a tube keeps in every time step: ``ceil(positions * ratio)``.

    This is VideoMAE's count: VideoMAE masks ``floor(positions * 0.9)``.
    """
    return grid.tokens_per_step - int(grid.tokens_per_step * (1 - _exact_share(ratio)))


def count_cell_positions(grid: TokenGrid, ratio: float) -> int:
    """Return how many of a running cell's four positions are kept in a time step.

    Raises:
        UserError: The ratio is not 0.25, 0.5 or 0.75, or cells do not fill the grid: rows and columns must be
            even, and time steps a multiple of four, so that every position is kept equally often.
    """
    kept = ratio * CELL_TOKENS
    if kept not in (1, 2, 3):
        raise UserError(f"strategy=running_cell needs a ratio of 0.25, 0.5 or 0.75, got {ratio}")
    if grid.rows % CELL_EDGE or grid.cols % CELL_EDGE or grid.time % CELL_TOKENS:
        raise UserError(
            f"strategy=running_cell needs even token rows and columns and a multiple of {CELL_TOKENS} time steps, "
            f"got {grid.rows} x {grid.cols} and {grid.time}; change data.image_size or data.num_frames"
        )
    return int(kept)


def count_selection(
    strategy: StrategyName, grid: TokenGrid, selected_ratio: float, visible_ratio: float, targets: TargetName
) -> ClipCounts:
    """Return the token counts of a clip in pre-training; raises the errors of `count_kept`.

    running_cell chooses for the decoder only. The encoder sees a tube, and the cells keep their share of the tube
    too. With all, every token is selected, and the visible ones are drawn at random.
    """
    selected = count_kept(strategy, grid, selected_ratio)
    if strategy == "running_cell":
        visible = count_kept("tube", grid, visible_ratio)
        both = visible * count_cell_positions(grid, selected_ratio) // CELL_TOKENS
    else:
        visible = both = count_kept("random" if strategy == "all" else strategy, grid, visible_ratio)
    return ClipCounts(
        selected=selected, visible=visible, targets=selected - both if targets == "masked" else selected
    )


def bound_counts(average: ClipCounts, selected: int, targets: TargetName, *, upper: bool) -> ClipCounts:
    """Return the lower or upper bound of the counts of a clip with another number of selected tokens.

    The visible tokens keep their share of the selected ones, rounded down or up (`model.budgets`).
    """
    below, rest = divmod(selected * average.visible, average.selected)
    above = below + (rest > 0)
    hidden = selected if targets == "selected" else selected - (below if upper else above)
    return ClipCounts(selected=selected, visible=above if upper else below, targets=hidden)


def count_candidate_steps(time: int, alpha: float) -> int:
    """Return from how many time steps frames are selected: ``floor(alpha * time)``.

    The paper has ``floor(2 * alpha * tau)`` frames; if their number is odd, the last one is not used.

    Raises:
        UserError: alpha is below 1.
    """
    if not alpha >= 1:
        raise UserError(f"alpha={alpha} must be at least 1; frames are selected from alpha times as many")
    return int(time * Fraction(repr(float(alpha))))


def noise_length(strategy: StrategyName, grid: TokenGrid, most_selected: int, candidate_steps: int = 0) -> int:
    """Return how many uniform values a clip needs for its selection.

    Args:
        strategy: rero draws the visible tokens, one value for each place in the order of importance. random and all
            draw tokens, tube draws positions, running_cell draws positions and then its phase.
        grid: The clip's tokens.
        most_selected: Largest number of selected tokens of a clip.
        candidate_steps: Time steps that frames are selected from; their values come last. 0 selects no frames.
    """
    own = {
        "rero": most_selected,
        "random": grid.num_tokens,
        "all": grid.num_tokens,
        "tube": grid.tokens_per_step,
        "running_cell": grid.tokens_per_step + 1,
    }
    return own[strategy] + candidate_steps


def describe_kept(ratio: float, num_kept: int, num_tokens: int) -> str:
    """Return how many of a clip's tokens are kept, as text: "keeps 0.6 of the tokens (940 of 1568)"."""
    if num_kept == num_tokens:
        return f"keeps all {num_tokens} tokens"
    return f"keeps {ratio:g} of the tokens ({num_kept} of {num_tokens})"


def _exact_share(ratio: float) -> Fraction:
    if not 0 < ratio <= 1:
        raise UserError(f"ratio={ratio} is outside (0, 1]; it is the share of a clip's tokens to keep")
    return Fraction(repr(float(ratio)))


def _divide(what: str, length: int, of: str, edge: int) -> int:
    if edge < 1:
        raise UserError(f"{of}={edge} must be at least 1")
    if length < 1 or length % edge:
        below = max(length // edge, 1) * edge
        raise UserError(f"{what}={length} is not a positive multiple of {of}={edge}; use {below} or {below + edge}")
    return length // edge
