"""Packed tokens: where each clip starts in one row of tokens, and each token's position in its clip.

Place in the flow: selected tokens -> gathered pixels -> packed embeddings -> blocks. The host knows how many tokens
each clip has, so nothing later synchronises with the device.
Axes: B clips, N tokens of a clip, S selected tokens of a clip, M tokens of the batch in one row.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each clip starts and ends in one row of tokens.

    Attributes:
        lengths: Tokens of each clip, on the host.
        cu_seqlens: (B + 1,) int32 on the device: where each clip starts, and the total.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device) -> "Packing":
        """Build the packing of clips of the given lengths."""
        for length in lengths:
            if length < 0:
                raise ValueError(f"a clip cannot have {length} tokens")
        if len(set(lengths)) == 1:  # created on the device, without a copy from the host
            cu_seqlens = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device) * lengths[0]
        else:
            ends = list(accumulate(lengths, initial=0))
            cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True)
        return cls(tuple(lengths), cu_seqlens)

    @functools.cached_property
    def is_even(self) -> bool:
        return len(set(self.lengths)) <= 1

    @functools.cached_property
    def total(self) -> int:
        return sum(self.lengths)

    @functools.cached_property
    def max_seqlen(self) -> int:
        """Tokens of the longest clip."""
        return max(self.lengths, default=0)

    def clip_of_token(self) -> Tensor:
        """Return each token's clip, (total,) int64."""
        lengths = self.cu_seqlens.diff().long()
        clip_B = torch.arange(len(self.lengths), device=lengths.device)
        return clip_B.repeat_interleave(lengths, output_size=self.total)


@dataclass(frozen=True)
class TokenSet:
    """Tokens of a batch: clip after clip, positions ascending within a clip.

    Attributes:
        position_M: Position in its clip's grid, int64.
        clip_M: Clip in the batch, int64.
        packing: The clips' lengths.
    """

    position_M: Tensor
    clip_M: Tensor
    packing: Packing

    @classmethod
    def from_positions(cls, position_BS: Tensor) -> "TokenSet":
        """Build the set of clips that keep equally many tokens; positions may be in any order."""
        num_clips, count = position_BS.shape
        packing = Packing.from_lengths([count] * num_clips, position_BS.device)
        return cls(position_BS.sort(dim=1).values.flatten(), packing.clip_of_token(), packing)

    @classmethod
    def from_mask(cls, kept_BN: Tensor, lengths: Sequence[int] | None = None) -> "TokenSet":
        """Build the set of a boolean mask, True = kept; counts may differ by clip.

        Synchronises with the device unless ``lengths``, the kept tokens of each clip, are given.
        """
        if lengths is None:
            lengths = [int(count) for count in kept_BN.sum(dim=1).tolist()]
        packing = Packing.from_lengths(lengths, kept_BN.device)
        kept_first = torch.argsort(kept_BN.flatten().byte(), descending=True, stable=True)
        position_M = kept_first[: packing.total] % kept_BN.shape[1]
        return cls(position_M, packing.clip_of_token(), packing)

    @classmethod
    def join(cls, parts: "Sequence[TokenSet]") -> "TokenSet":
        """Concatenate the clips of several batches."""
        if len(parts) == 1:
            return parts[0]
        lengths = [length for part in parts for length in part.packing.lengths]
        packing = Packing.from_lengths(lengths, parts[0].position_M.device)
        return cls(torch.cat([part.position_M for part in parts]), packing.clip_of_token(), packing)

    def split(self, num_clips: Sequence[int]) -> "list[TokenSet]":
        """Undo `join`: return batches of ``num_clips`` clips each; each batch numbers its clips from 0."""
        if sum(num_clips) != len(self.packing.lengths):
            raise ValueError(f"expected {len(self.packing.lengths)} clips in all, got {sum(num_clips)}")
        if len(num_clips) == 1:
            return [self]
        parts, clip, row = [], 0, 0
        for count in num_clips:
            packing = Packing.from_lengths(self.packing.lengths[clip : clip + count], self.position_M.device)
            rows = slice(row, row + packing.total)
            parts.append(TokenSet(self.position_M[rows], self.clip_M[rows] - clip, packing))
            clip, row = clip + count, rows.stop
        return parts
