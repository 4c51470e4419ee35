"""The fine-tuning model: the encoder over ReRo-selected tokens, mean over each clip, norm, linear head.

Place in the flow: clips in, logits out. Axes: B clips, C T H W of a clip, M packed kept tokens, D width,
L branches (attention and MLP of each block, in order).
"""

import contextlib

import torch
from torch import Tensor, nn

from everest_ds.geometry import TokenGrid, ratio_to_count
from everest_ds.model.encoder import DEFAULT_OPTIONS, EncoderOptions, TokenEncoder
from everest_ds.model.selection import TokenIndex, select_most_important
from everest_ds.model.sizes import ModelSize
from everest_ds.model.transformer import NORM_EPS, branch_scales, init_linear_normal


class EverestClassifier(TokenEncoder):
    """Video classifier over the tokens that changed most.

    Args:
        size: Width, depth and heads of the encoder.
        grid: The token grid that positions are laid out for; other grids get them interpolated.
        options: Tubelets, attention, checkpointing.
        num_classes: Outputs of the head.
        keep_ratio: rho_pre of fine-tuning, share of a clip's tokens in (0, 1]; 1 keeps all and ranks nothing.
        head_init_scale: Factor on the head's initial weights (official `init_scale`).
        drop_path: Share of clips that skip a branch of the last block in training, in [0, 1); falls linearly to 0
            at the first (stochastic depth).

    Source: EVEREST Sec. 4.1, Table 8. Parameter names are those of the official `VisionTransformer`.
    """

    def __init__(
        self,
        size: ModelSize,
        grid: TokenGrid,
        options: EncoderOptions = DEFAULT_OPTIONS,
        *,
        num_classes: int,
        keep_ratio: float = 0.6,
        head_init_scale: float = 0.001,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(size, grid, options)
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path={drop_path} must be in [0, 1)")
        self.drop_path = drop_path
        self.is_encoder_frozen = False
        self.keep_ratio = keep_ratio
        self.num_classes = num_classes
        self.fc_norm = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.head = nn.Linear(size.width, num_classes)
        self.apply(init_linear_normal)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)

    @property
    def num_noise(self) -> int:
        """Uniform values that training wants for each clip: one a branch, or none without drop path."""
        return 2 * len(self.blocks) if self.drop_path and not self.is_encoder_frozen else 0

    def freeze_encoder(self) -> None:
        """Leave only the last norm and the head to train (linear probe); the encoder then keeps no activations.

        A frozen encoder drops no branches.
        """
        self.requires_grad_(False)
        self.fc_norm.requires_grad_(True)
        self.head.requires_grad_(True)
        self.is_encoder_frozen = True

    def forward(self, clips_BCTHW: Tensor, noise_BL: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return logits (B, classes).

        Args:
            clips_BCTHW: uint8 pixels or floats in [0, 1].
            noise_BL: Uniform in [0, 1), float32, `num_noise` values a clip. Training with drop path needs it;
                evaluation ignores it.

        Raises:
            ValueError: Training with drop path, and the noise is missing or of another shape.
        """
        return self.head(self.forward_features(clips_BCTHW, noise_BL))

    def forward_features(self, clips_BCTHW: Tensor, noise_BL: Tensor | None = None) -> Tensor:
        """Return each clip's normalised mean token, (B, D)."""
        return self.fc_norm(self.pool(clips_BCTHW, noise_BL))

    def pool(self, clips_BCTHW: Tensor, noise_BL: Tensor | None = None) -> Tensor:
        """Return the mean of each clip's encoded tokens, before the norm, (B, D): the encoder's features."""
        grid = self.grid_of(clips_BCTHW)
        scale_BL = self._branch_scales(len(clips_BCTHW), noise_BL)
        with torch.no_grad() if self.is_encoder_frozen else contextlib.nullcontext():
            kept = self.select(clips_BCTHW, grid)
            x_MD = super().forward(clips_BCTHW, kept, grid, scale_BL)
            return mean_per_clip(x_MD, kept)

    def _branch_scales(self, num_clips: int, noise_BL: Tensor | None) -> Tensor | None:
        if not self.training or not self.num_noise:
            return None
        expected = (num_clips, self.num_noise)
        if noise_BL is None or noise_BL.shape != expected:
            given = "none" if noise_BL is None else f"noise of shape {tuple(noise_BL.shape)}"
            raise ValueError(f"training with drop_path={self.drop_path} needs noise {expected}, got {given}")
        return branch_scales(noise_BL, self.drop_path)

    def select(self, clips_BCTHW: Tensor, grid: TokenGrid) -> TokenIndex:
        """Return the tokens that are kept of each clip."""
        count = ratio_to_count(grid.num_tokens, self.keep_ratio)
        if count == grid.num_tokens:
            position_N = torch.arange(count, device=clips_BCTHW.device)
            return TokenIndex.of_equal_counts(position_N.expand(len(clips_BCTHW), -1))
        return select_most_important(self.rank(clips_BCTHW, grid), count)


def mean_per_clip(x_MD: Tensor, index: TokenIndex) -> Tensor:
    """Average packed tokens over each clip, (B, D).

    Raises:
        ValueError: A clip has no tokens.
    """
    lengths = index.packing.lengths
    if min(lengths, default=0) < 1:
        raise ValueError("a clip without tokens has no mean")
    if len(set(lengths)) == 1:  # sums in float32 whatever the dtype, keeps nothing for backward, and repeats
        return x_MD.view(len(lengths), lengths[0], -1).mean(dim=1)
    sums_BD = torch.zeros(len(lengths), x_MD.shape[1], device=x_MD.device).index_add(0, index.clip_M, x_MD.float())
    cu_seqlens = index.packing.cu_seqlens
    return (sums_BD / (cu_seqlens[1:] - cu_seqlens[:-1])[:, None]).to(x_MD.dtype)
