"""Which tokens the encoder sees and which the decoder predicts, and how they are packed.

Place in the flow: importance_BN -> Selection(visible, target) -> gathered pixels -> PackedTokens.
Small pure functions; how many tokens each clip has is known on the host, so nothing here waits for the device.
Axes: B clips, N tokens of a clip, S selected tokens of a clip, L visible tokens and R target tokens of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How one row of tokens falls into clips.

    Attributes:
        lengths: Tokens of each clip, on the host.
        cu_seqlens: (B + 1,) int32 on the device: where each clip starts, and the total.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Packing":
        """Build the packing of clips of the given lengths."""
        ends = [0]
        for length in lengths:
            if length < 0:
                raise ValueError(f"a clip cannot have {length} tokens")
            ends.append(ends[-1] + length)
        if len(set(lengths)) == 1:  # made on the device, without a copy from the host
            cu_seqlens = torch.arange(len(ends), dtype=torch.int32, device=device) * lengths[0]
        else:
            cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True)
        return cls(tuple(lengths), cu_seqlens)

    @property
    def total(self) -> int:
        """Tokens of all clips."""
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest clip."""
        return max(self.lengths, default=0)

    def clip_of_token(self) -> Tensor:
        """Return each token's clip, (total,) int64."""
        device = self.cu_seqlens.device
        lengths = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).long()
        return torch.arange(len(self.lengths), device=device).repeat_interleave(lengths, output_size=self.total)


@dataclass(frozen=True)
class TokenIndex:
    """A set of tokens of a batch: clip after clip, positions ascending within a clip.

    Attributes:
        position_M: Position in its clip's grid, int64.
        clip_M: Clip in the batch, int64.
        packing: The clips' lengths.
    """

    position_M: Tensor
    clip_M: Tensor
    packing: Packing

    @classmethod
    def of_equal_counts(cls, position_BS: Tensor) -> "TokenIndex":
        """Build the index of clips that keep equally many tokens; positions in any order."""
        num_clips, count = position_BS.shape
        packing = Packing.of([count] * num_clips, position_BS.device)
        return cls(position_BS.sort(dim=1).values.flatten(), packing.clip_of_token(), packing)

    @classmethod
    def of_mask(cls, kept_BN: Tensor) -> "TokenIndex":
        """Build the index of a boolean mask, True = kept; counts may differ by clip. Waits for the device."""
        lengths = [int(count) for count in kept_BN.sum(dim=1).tolist()]
        clip_M, position_M = kept_BN.nonzero(as_tuple=True)
        return cls(position_M, clip_M, Packing.of(lengths, kept_BN.device))


@dataclass(frozen=True)
class Selection:
    """The tokens that the encoder sees and those that the decoder predicts."""

    visible: TokenIndex
    target: TokenIndex

    def __post_init__(self) -> None:
        """Check that both name tokens of the same number of clips."""
        clips = len(self.visible.packing.lengths), len(self.target.packing.lengths)
        if clips[0] != clips[1]:
            raise ValueError(f"visible tokens are of {clips[0]} clips, target tokens of {clips[1]}")


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of a batch in one row, with no padding.

    Attributes:
        x_MD: Embeddings.
        packing: Where each clip starts and ends.
    """

    x_MD: Tensor
    packing: Packing


def rank_by_importance(importance_BN: Tensor) -> Tensor:
    """Return each clip's positions from the most to the least important, (B, N) int64.

    Equal importance: lower position first.

    Differs from the official code: that sort is unstable, and 10 to 14 % of the ranks differ between runs.
    """
    return torch.argsort(importance_BN, dim=1, descending=True, stable=True)


def select_most_important(importance_BN: Tensor, count: int) -> TokenIndex:
    """Return each clip's ``count`` most important tokens: the whole selection of fine-tuning."""
    _require_count(count, importance_BN.shape[1], "count")
    return TokenIndex.of_equal_counts(rank_by_importance(importance_BN)[:, :count])


def select_rero(
    importance_BN: Tensor, noise_BS: Tensor, *, num_visible: int, keep_visible_as_target: bool = False
) -> Selection:
    """Redundancy-robust selection: the most important S tokens, of which random ones are visible.

    Args:
        importance_BN: From `rero_importance`.
        noise_BS: Uniform noise in [0, 1). Column r belongs to the token of rank r, not to a position; S is how
            many tokens are selected.
        num_visible: How many of the selected tokens the encoder sees: those with the lowest noise.
        keep_visible_as_target: Targets are all selected tokens (Eq. 3) instead of those that are not visible.

    Returns:
        Visible and target tokens, equally many for every clip.

    Raises:
        ValueError: More selected than tokens, more visible than selected, or no target left.

    Source: EVEREST Sec. 4.1; the noise as in the official code, which reconstructs the masked tokens only.
    """
    num_selected = noise_BS.shape[1]
    _require_count(num_selected, importance_BN.shape[1], "the noise's width (tokens selected)")
    _require_count(num_visible, num_selected, "num_visible")
    if noise_BS.shape[0] != importance_BN.shape[0]:
        raise ValueError(f"noise for {noise_BS.shape[0]} clips, importance for {importance_BN.shape[0]}")
    selected_BS = rank_by_importance(importance_BN)[:, :num_selected]
    shuffled_BS = selected_BS.gather(1, torch.argsort(noise_BS, dim=1, stable=True))
    target_BS = shuffled_BS if keep_visible_as_target else shuffled_BS[:, num_visible:]
    if target_BS.shape[1] == 0:
        raise ValueError(f"all {num_selected} selected tokens are visible; none is left to reconstruct")
    return Selection(
        visible=TokenIndex.of_equal_counts(shuffled_BS[:, :num_visible]),
        target=TokenIndex.of_equal_counts(target_BS),
    )


def _require_count(count: int, available: int, name: str) -> None:
    if not 1 <= count <= available:
        raise ValueError(f"{name}={count} must be between 1 and {available}")
