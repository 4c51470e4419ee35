"""The EVEREST masked autoencoder: rank all tokens without gradient, encode few, predict the targets.

Place in the flow: clips and selection noise in, predictions and targets for the target tokens out. Axes: B clips,
C T H W of a clip, N tokens of a clip, S selected tokens, L packed visible tokens, R packed target tokens,
M both, D encoder or decoder width, P pixel values of a tubelet.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everest_ds.model.encoder import DEFAULT_OPTIONS, EncoderOptions, TokenEncoder
from everest_ds.model.frames import FrameChoice
from everest_ds.model.packing import Packing, TokenSet
from everest_ds.model.selection import DEFAULT_RULE, Selection, SelectionRule
from everest_ds.model.sizes import ModelSize
from everest_ds.model.transformer import NORM_EPS, init_linears, make_blocks, run_blocks
from everest_ds.model.tubelets import (
    ClipGroup,
    gather_positions,
    gather_tubelets,
    reconstruction_target,
    sinusoid_positions,
)
from everest_ds.tokens import ClipCounts, TokenGrid

CountClips = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Sequence[ClipCounts]]]
"""Takes importance_BN and noise_BS of each group of clips, returns each clip's counts (`model.budgets`)."""


class Reconstruction(NamedTuple):
    """Predicted and true pixels of the target tokens.

    A named tuple, because ZeRO-3 finds a module's output tensors, and so the moment to gather its parameters again
    for backward, in tuples but not in dataclasses.

    Attributes:
        prediction_RP: Standardised pixels as predicted, P over (frame, row, column, channel).
        target_RP: Standardised pixels of the video, float32.
        selection: Visible and target tokens.
        frames: The drawn time steps of each group's clips; empty if the rule draws none.
    """

    prediction_RP: Tensor
    target_RP: Tensor
    selection: Selection
    frames: tuple[FrameChoice, ...] = ()

    @property
    def loss(self) -> Tensor:
        """The mean squared error over all target tokens. Source: official code (Eq. 3 writes a norm)."""
        return F.mse_loss(self.prediction_RP.float(), self.target_RP)


class _Ranked(NamedTuple):
    """Clips of one shape before tokens are selected."""

    group: ClipGroup
    noise_BS: Tensor
    importance_BN: Tensor | None
    frames: FrameChoice | None = None


class PretrainEncoder(TokenEncoder):
    """The encoder, followed by a norm in pre-training."""

    def __init__(self, size: ModelSize, grid: TokenGrid, options: EncoderOptions = DEFAULT_OPTIONS) -> None:
        super().__init__(size, grid, options)
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)

    def forward(self, groups: Sequence[ClipGroup], tokens: TokenSet) -> Tensor:  # type: ignore[override]
        """Encode tokens: (L, D)."""
        return self.norm(super().forward(groups, tokens))


class Decoder(nn.Module):
    """Narrow transformer over visible and target tokens; predicts the pixels of the target tokens."""

    positions_ND: Tensor

    def __init__(self, size: ModelSize, grid: TokenGrid, options: EncoderOptions, *, depth: int) -> None:
        super().__init__()
        self.grid = grid
        self.options = options
        width = size.decoder_width
        self.blocks = make_blocks(width, depth, size.decoder_num_heads, options)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, 3 * options.tubelet_size * options.patch_size**2)
        self.register_buffer("positions_ND", sinusoid_positions(grid, width), persistent=False)

    def forward(
        self, visible_LD: Tensor, mask_token_D: Tensor, selection: Selection, groups: Sequence[ClipGroup]
    ) -> Tensor:
        """Predict the pixels of the target tokens: (R, P)."""

        def positions(tokens: TokenSet) -> Tensor:
            # In the dtype of the weights, not of the visible tokens, which are bfloat16 under autocast.
            return gather_positions(self.positions_ND, self.grid, groups, tokens, mask_token_D.dtype)

        x_MD, packing, target_rows_R = interleave_clips(
            visible_LD + positions(selection.visible), mask_token_D + positions(selection.target), selection
        )
        x_MD = run_blocks(self.blocks, x_MD, packing, self.options)
        return self.head(self.norm(x_MD[target_rows_R]))


class EverestAutoencoder(nn.Module):
    """Masked video autoencoder over redundancy-robust tokens.

    Positions are computed for ``grid`` and interpolated for clips of other grids.

    Source: EVEREST Sec. 4.1. Parameter names are those of the official `PretrainVisionTransformer`.
    """

    def __init__(
        self,
        size: ModelSize,
        grid: TokenGrid,
        options: EncoderOptions = DEFAULT_OPTIONS,
        *,
        decoder_depth: int = 4,
    ) -> None:
        super().__init__()
        self.encoder = PretrainEncoder(size, grid, options)
        self.encoder_to_decoder = nn.Linear(size.width, size.decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.decoder_width))
        self.decoder = Decoder(size, grid, options, depth=decoder_depth)
        init_linears(self, nn.init.xavier_uniform_)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(
        self,
        clips: Tensor | Sequence[Tensor],
        noise: Tensor | Sequence[Tensor],
        rule: SelectionRule = DEFAULT_RULE,
        count_clips: CountClips | None = None,
    ) -> Reconstruction:
        """Select tokens of each clip, encode the visible ones, predict the target ones.

        Args:
            clips: clips_BCTHW, uint8 or floats in [0, 1], not yet standardised; or several such batches of
                different lengths and sizes, which are packed into one row.
            noise: noise_BS, uniform in [0, 1), of each batch of clips: `SelectionRule.noise_length` values a clip,
                then one for each candidate step where the rule chooses frames.
            rule: Which tokens are kept, and which frames.
            count_clips: Returns how many tokens each clip keeps, if clips differ; for rero only.

        Raises:
            UserError: Frames or pixels that do not divide into tubelets.
            ValueError: Noise or counts that do not fit, see `SelectionRule.select`.
        """
        noises = [noise] if isinstance(noise, Tensor) else noise
        ranked = [self._rank(g, n, rule) for g, n in zip(self.encoder.group(clips), noises, strict=True)]
        counts: Sequence[Sequence[ClipCounts] | None] = [None] * len(ranked)
        if count_clips is not None:
            importance = [r.importance_BN for r in ranked if r.importance_BN is not None]
            counts = count_clips(importance, [r.noise_BS for r in ranked])
        selection = Selection.join(
            [
                rule.select(r.group.grid, r.noise_BS, r.importance_BN, of_group)
                for r, of_group in zip(ranked, counts, strict=True)
            ]
        )
        frames = tuple(r.frames for r in ranked if r.frames is not None)
        return self.reconstruct([r.group.clips_BCTHW for r in ranked], selection)._replace(frames=frames)

    def _rank(self, group: ClipGroup, noise: Tensor, rule: SelectionRule) -> "_Ranked":
        """Choose frames if the rule does, and rank tokens if its strategy needs importance."""
        if rule.num_steps is not None and rule.num_steps != group.grid.time:
            noise_BS, noise_BK = noise.tensor_split([-group.grid.time], dim=1)
            chosen, importance_BN, frames = self.encoder.choose_frames(
                group, noise_BK, rule.num_steps, ratio=rule.selected_ratio, distance=rule.distance
            )
            return _Ranked(chosen, noise_BS, importance_BN, frames)
        importance = self.encoder.rank(group, rule.distance) if rule.strategy == "rero" else None
        return _Ranked(group, noise, importance)

    def reconstruct(self, clips: Tensor | Sequence[Tensor], selection: Selection) -> Reconstruction:
        """Encode the visible tokens of any selection and predict its target tokens."""
        groups = self.encoder.group(clips)
        visible_LD = self.encoder_to_decoder(self.encoder(groups, selection.visible))
        prediction_RP = self.decoder(visible_LD, self.mask_token[0, 0], selection, groups)
        target_RP = reconstruction_target(gather_tubelets(groups, selection.target))
        return Reconstruction(prediction_RP, target_RP, selection)


def interleave_clips(visible_LD: Tensor, target_RD: Tensor, selection: Selection) -> tuple[Tensor, Packing, Tensor]:
    """Pack each clip's visible tokens followed by its target tokens.

    Returns:
        The tokens (M, D), their packing, and the row of each target token, (R,) int64.
    """
    visible, target = selection.visible, selection.target
    device = visible_LD.device
    # A visible token comes after the targets of earlier clips, a target also after its own clip's visible tokens.
    visible_rows_L = torch.arange(visible.packing.total, device=device) + target.packing.cu_seqlens[visible.clip_M]
    target_rows_R = (
        torch.arange(target.packing.total, device=device) + visible.packing.cu_seqlens[target.clip_M + 1]
    )
    rows_M = torch.cat((visible_rows_L, target_rows_R))
    source_M = torch.empty_like(rows_M).scatter_(0, rows_M, torch.arange(len(rows_M), device=device))
    both = zip(visible.packing.lengths, target.packing.lengths, strict=True)
    packing = Packing.from_lengths([sum(lengths) for lengths in both], device)
    return torch.cat((visible_LD, target_RD))[source_M], packing, target_rows_R
