"""The encoder of pre-training and fine-tuning: rank all tokens, embed the chosen ones, run the blocks.

Place in the flow: clips and a TokenSet in, encoded tokens out. Clips may differ in length and size: those of one
shape make a group. Axes: B clips, C T H W of a clip, N tokens of a clip, J of a time step, K candidate steps,
M chosen tokens of the batch in one packed row, D width, L branches (two a block).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from everest_ds.model.frames import FrameChoice, count_per_step, draw_steps, gather_steps
from everest_ds.model.importance import NO_CHANGE, rero_importance
from everest_ds.model.packing import TokenSet
from everest_ds.model.sizes import ModelSize
from everest_ds.model.transformer import EncoderOptions, make_blocks, run_blocks
from everest_ds.model.tubelets import (
    ClipGroup,
    TubeletEmbedding,
    gather_positions,
    gather_tubelets,
    sinusoid_positions,
    standardise,
    token_grid,
)
from everest_ds.tokens import DistanceName, TokenGrid, ratio_to_count

# Pixel values that are converted to float32 at once while all tokens are ranked (256 MiB).
RANKING_CHUNK = 2**26


DEFAULT_OPTIONS = EncoderOptions()


class TokenEncoder(nn.Module):
    """Tubelet embedding, fixed positions and transformer blocks over any subset of a clip's tokens.

    Positions are computed for ``grid`` and interpolated for clips of other grids.
    """

    positions_ND: Tensor

    def __init__(self, size: ModelSize, grid: TokenGrid, options: EncoderOptions = DEFAULT_OPTIONS) -> None:
        super().__init__()
        self.size = size
        self.grid = grid
        self.options = options
        self.patch_embed = TubeletEmbedding(
            width=size.width,
            tubelet_size=options.tubelet_size,
            patch_size=options.patch_size,
            num_layers=options.embedding_layers,
        )
        self.blocks = make_blocks(size.width, size.depth, size.num_heads, options)
        self.register_buffer("positions_ND", sinusoid_positions(grid, size.width), persistent=False)

    def group(self, clips: Tensor | Sequence[Tensor]) -> list[ClipGroup]:
        """Return each batch of clips of one shape with its grid.

        Raises:
            UserError: Frames or pixels that do not divide into tubelets.
        """
        batches = [clips] if isinstance(clips, Tensor) else clips
        tubelet, patch = self.options.tubelet_size, self.options.patch_size
        return [ClipGroup(b, token_grid(b, tubelet_size=tubelet, patch_size=patch)) for b in batches]

    def _embed_all(self, clips_BCTHW: Tensor) -> Tensor:
        """Return the embeddings x_BND of all tokens, computed in float32."""
        as_bytes = self.patch_embed.embeds_bytes(clips_BCTHW)
        return self.patch_embed(clips_BCTHW if as_bytes else standardise(clips_BCTHW))

    @torch.no_grad()
    def rank(self, group: ClipGroup, distance: DistanceName = "l2") -> Tensor:
        """Return importance_BN of all tokens, embedded in float32, a few clips at a time, without gradient."""
        clips_at_once = max(1, RANKING_CHUNK // group.clips_BCTHW[0].numel())
        chunks = group.clips_BCTHW.split(clips_at_once)
        with full_float32(group.clips_BCTHW.device.type):
            return torch.cat([rero_importance(self._embed_all(chunk), group.grid, distance) for chunk in chunks])

    @torch.no_grad()
    def choose_frames(
        self, group: ClipGroup, noise_BK: Tensor, num_steps: int, *, ratio: float, distance: DistanceName = "l2"
    ) -> tuple[ClipGroup, Tensor, FrameChoice]:
        """Draw time steps of candidate clips by how much changes in them (`model.frames`).

        Args:
            group: Clips of K candidate time steps.
            noise_BK: A uniform value for each candidate step.
            num_steps: Steps to draw.
            ratio: Share of the candidates' tokens that counts as changing.
            distance: See `rero_importance`.

        Returns:
            The clips of the drawn steps, their importance_BN, and the choice.
        """
        time, count = group.grid.time, ratio_to_count(group.grid.num_tokens, ratio)
        grid = replace(group.grid, time=num_steps)
        importance, counts, steps = [], [], []
        clips_at_once = max(1, RANKING_CHUNK // group.clips_BCTHW[0].numel())
        chunks = zip(group.clips_BCTHW.split(clips_at_once), noise_BK.split(clips_at_once), strict=True)
        with full_float32(group.clips_BCTHW.device.type):
            for chunk_BCTHW, chunk_noise_BK in chunks:
                x_BND = self._embed_all(chunk_BCTHW)
                importance_BN = rero_importance(x_BND, group.grid, distance)
                counts_BK = count_per_step(importance_BN, group.grid, count, no_change=NO_CHANGE[distance])
                steps_BT = draw_steps(counts_BK, chunk_noise_BK, num_steps)
                x_BKJD = rearrange(x_BND, "b (k j) d -> b k j d", k=time)
                clip_B1 = torch.arange(len(x_BKJD), device=x_BKJD.device)[:, None]
                importance.append(rero_importance(x_BKJD[clip_B1, steps_BT].flatten(1, 2), grid, distance))
                counts.append(counts_BK)
                steps.append(steps_BT)
        choice = FrameChoice(torch.cat(steps), torch.cat(counts))
        clips_BCTHW = gather_steps(group.clips_BCTHW, choice.steps_BT, self.options.tubelet_size)
        return ClipGroup(clips_BCTHW, grid), torch.cat(importance), choice

    def forward(self, groups: Sequence[ClipGroup], tokens: TokenSet, scale_BL: Tensor | None = None) -> Tensor:
        """Embed tokens with gradient, add positions, run the blocks: (M, D). ``scale_BL``: see `branch_scales`."""
        dtype = self.patch_embed.proj.weight.dtype
        pixels_MCTHW = standardise(gather_tubelets(groups, tokens)).to(dtype)
        x_MD = self.patch_embed(pixels_MCTHW).squeeze(1)
        x_MD = x_MD + gather_positions(self.positions_ND, self.grid, groups, tokens, dtype)
        scale_LM = None if scale_BL is None else scale_BL.to(dtype).T[:, tokens.clip_M]
        return run_blocks(self.blocks, x_MD, tokens.packing, self.options, scale_LM)


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
