"""Token arithmetic in exact integers. A leaf without torch: config, data, model and commands all count with it.

Place in the flow: a clip of T frames of H x W pixels becomes a grid of tubelet tokens, time-major and then
row-major, and ratios of that grid become counts. There is one function for each; nothing else in the project
multiplies out a token count.
"""

from dataclasses import dataclass
from fractions import Fraction

from everest_ds.errors import UserError


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
        _require_multiple("num_frames", num_frames, "tubelet_size", tubelet_size)
        _require_multiple("image height", height, "patch_size", patch_size)
        _require_multiple("image width", width, "patch_size", patch_size)
        return cls(time=num_frames // tubelet_size, rows=height // patch_size, cols=width // patch_size)


def ratio_to_count(num_tokens: int, ratio: float) -> int:
    """Return ``floor(num_tokens * ratio)`` with the ratio taken as the decimal that was written.

    0.3 is three tenths, not the nearest binary number: 1568 tokens give 470 at 0.3, 156 at 0.1 and 940 at 0.6.

    Differs from the official code: that computes ``int((1 - masked) * num_tokens)`` in floats, which loses a
    token at some sizes (``(1 - 0.7) * 10`` is 2.99...).

    Raises:
        UserError: The ratio is outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise UserError(f"ratio={ratio} is outside (0, 1]; it is the share of a clip's tokens that is kept")
    return int(num_tokens * Fraction(repr(float(ratio))))


def _require_multiple(what: str, length: int, of: str, edge: int) -> None:
    if edge < 1:
        raise UserError(f"{of}={edge} must be at least 1")
    if length < 1 or length % edge:
        below = max(length // edge, 1) * edge
        raise UserError(f"{what}={length} is not a positive multiple of {of}={edge}; use {below} or {below + edge}")
