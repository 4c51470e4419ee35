"""The encoder that pre-training and fine-tuning share: rank tubelets, embed the chosen ones, run the blocks.

Place in the flow: clips and a TokenIndex in, encoded tokens out. Axes: B clips, C T H W of a clip,
N tokens of a clip, M chosen tokens of the batch in one packed row, D width, L branches (two a block).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from everest_ds.geometry import TokenGrid
from everest_ds.model.importance import rero_importance
from everest_ds.model.selection import PackedTokens, TokenIndex
from everest_ds.model.sizes import ModelSize
from everest_ds.model.transformer import make_blocks, run_blocks
from everest_ds.model.tubelets import (
    TubeletEmbedding,
    gather_tubelets,
    grid_of,
    interpolate_positions,
    sinusoid_positions,
    standardise,
)

# Pixel values that are held in float32 at once while all tokens are ranked (256 MiB).
RANKING_CHUNK = 2**26


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """What all models have in common besides their size.

    Attributes:
        tubelet_size: Frames of a tubelet.
        patch_size: Pixels of a tubelet's edge.
        embedding_layers: Conv3d layers of the tubelet embedding: 1, 2 or 3.
        attention: An attention backend's name, or auto.
        activation_checkpointing: Recompute each block in backward instead of storing its activations.
    """

    tubelet_size: int = 2
    patch_size: int = 16
    embedding_layers: int = 1
    attention: str = "auto"
    activation_checkpointing: bool = False


DEFAULT_OPTIONS = EncoderOptions()


class TokenEncoder(nn.Module):
    """Tubelet embedding, fixed positions and transformer blocks over any subset of a clip's tokens.

    Args:
        size: Width, depth and heads.
        grid: The token grid that positions are laid out for; other grids get them interpolated.
        options: Tubelets, attention, checkpointing.
    """

    positions_ND: Tensor

    def __init__(self, size: ModelSize, grid: TokenGrid, options: EncoderOptions = DEFAULT_OPTIONS) -> None:
        super().__init__()
        self.grid = grid
        self.options = options
        self.patch_embed = TubeletEmbedding(
            width=size.width,
            tubelet_size=options.tubelet_size,
            patch_size=options.patch_size,
            num_layers=options.embedding_layers,
        )
        self.blocks = make_blocks(
            width=size.width, depth=size.depth, num_heads=size.num_heads, backend=options.attention
        )
        self.register_buffer("positions_ND", sinusoid_positions(grid, size.width), persistent=False)

    def grid_of(self, clips_BCTHW: Tensor) -> TokenGrid:
        """Return the token grid of a batch of clips; refuses lengths that do not divide into tubelets."""
        return grid_of(clips_BCTHW, tubelet_size=self.options.tubelet_size, patch_size=self.options.patch_size)

    def gather(self, clips_BCTHW: Tensor, index: TokenIndex) -> Tensor:
        """Return the pixels of the tokens of the index, (M, C, tubelet, patch, patch)."""
        return gather_tubelets(
            clips_BCTHW, index, tubelet_size=self.options.tubelet_size, patch_size=self.options.patch_size
        )

    @torch.no_grad()
    def rank(self, clips_BCTHW: Tensor, grid: TokenGrid) -> Tensor:
        """Return importance_BN of all tokens: embedded in float32, a few clips at a time, nothing kept."""
        clips_at_once = max(1, RANKING_CHUNK // clips_BCTHW[0].numel())
        with full_float32(clips_BCTHW.device.type):
            return torch.cat(
                [
                    rero_importance(self.patch_embed(standardise(chunk_BCTHW)), grid)
                    for chunk_BCTHW in clips_BCTHW.split(clips_at_once)
                ]
            )

    def forward(
        self, clips_BCTHW: Tensor, index: TokenIndex, grid: TokenGrid, scale_BL: Tensor | None = None
    ) -> Tensor:
        """Embed the tokens of the index with gradient, add positions, run the blocks: (M, D).

        Args:
            clips_BCTHW: uint8, or floats in [0, 1].
            index: The tokens.
            grid: The clips' token grid.
            scale_BL: Factors of each clip's branches (`branch_scales`); None scales nothing.
        """
        dtype = self.patch_embed.proj.weight.dtype
        pixels_MCTHW = standardise(self.gather(clips_BCTHW, index)).to(dtype)
        positions_ND = interpolate_positions(self.positions_ND, self.grid, grid).to(dtype)
        x_MD = self.patch_embed(pixels_MCTHW).squeeze(1) + positions_ND[index.position_M]
        tokens = PackedTokens(x_MD, index.packing)
        scale_LM = None if scale_BL is None else scale_BL.to(dtype).T[:, index.clip_M]
        checkpointing = self.options.activation_checkpointing
        return run_blocks(self.blocks, tokens, checkpointing=checkpointing, scale_LM=scale_LM)


@contextlib.contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Compute in true float32: no autocast, no TF32 convolutions on the GPU."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    can_autocast = torch.amp.is_autocast_available(device_type)
    try:
        with torch.autocast(device_type, enabled=False) if can_autocast else contextlib.nullcontext():
            yield
    finally:
        convolutions.fp32_precision = before
