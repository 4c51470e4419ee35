"""The fine-tuning model: the encoder over kept tokens, mean over each clip, norm, linear head.

Place in the flow: clips in, logits out. Clips may differ in length and size. Axes: B clips, C T H W of a clip, M
packed kept tokens, D width, L branches (attention and MLP of each block, in order), S noise values of a clip.
"""

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from everest_ds.model.encoder import DEFAULT_OPTIONS, EncoderOptions, TokenEncoder
from everest_ds.model.packing import TokenSet
from everest_ds.model.selection import SelectionRule
from everest_ds.model.sizes import ModelSize
from everest_ds.model.transformer import NORM_EPS, branch_scales, init_linears
from everest_ds.model.tubelets import ClipGroup
from everest_ds.tokens import TokenGrid

Clips = Tensor | Sequence[Tensor]
"""clips_BCTHW, uint8 or floats in [0, 1]; or several such batches of different lengths and sizes."""
Noise = Tensor | Sequence[Tensor] | None
"""noise_BS of each batch of clips."""
DEFAULT_KEEP_RULE = SelectionRule(selected_ratio=0.6)


class EverestClassifier(TokenEncoder):
    """Video classifier over a part of each clip's tokens, by default those that changed most.

    Args:
        size: Width, depth and heads of the encoder.
        grid: The token grid that positions are computed for; they are interpolated for other grids.
        options: See `EncoderOptions`.
        num_classes: Outputs of the head.
        rule: Which tokens are kept of each clip; a selected_ratio of 1 keeps all and ranks nothing.
        head_init_scale: Factor on the head's initial weights (official `init_scale`).
        drop_path: Share of clips that skip a branch of the last block in training, in [0, 1). It falls linearly to
            0 at the first block (stochastic depth).

    Source: EVEREST Sec. 4.1, Table 8. Parameter names are those of the official `VisionTransformer`.
    """

    def __init__(
        self,
        size: ModelSize,
        grid: TokenGrid,
        options: EncoderOptions = DEFAULT_OPTIONS,
        *,
        num_classes: int,
        rule: SelectionRule = DEFAULT_KEEP_RULE,
        head_init_scale: float = 0.001,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(size, grid, options)
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path={drop_path} must be in [0, 1)")
        self.drop_path = drop_path
        self.is_encoder_frozen = False
        self.rule = rule
        self.num_classes = num_classes
        self.fc_norm = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.head = nn.Linear(size.width, num_classes)
        init_linears(self, functools.partial(nn.init.trunc_normal_, std=0.02, a=-0.02, b=0.02))
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)

    @property
    def num_branch_noise(self) -> int:
        """Noise values of drop path for each clip in training: one a branch."""
        return 2 * len(self.blocks) if self.drop_path and not self.is_encoder_frozen else 0

    def num_noise(self, grid: TokenGrid) -> int:
        """Return how many noise values a clip needs in training: drop path's, then the rule's."""
        return self.num_branch_noise + self.rule.keep_noise_length(grid)

    def freeze_encoder(self) -> None:
        """Train only the last norm and the head; the encoder then keeps no activations and drops no branches."""
        self.requires_grad_(False)
        self.fc_norm.requires_grad_(True)
        self.head.requires_grad_(True)
        self.is_encoder_frozen = True

    def forward(self, clips: Clips, noise: Noise = None) -> Tensor:  # type: ignore[override]
        """Return logits (B, classes).

        Args:
            clips: One batch of clips, or several of different lengths and sizes.
            noise: Uniform in [0, 1), float32, `num_noise` values a clip, for each batch. Evaluation ignores it: a
                rule that draws tokens then keeps the same ones of every clip.

        Raises:
            ValueError: In training, if the noise is missing or has another shape.
        """
        return self.head(self.forward_features(clips, noise))

    def forward_features(self, clips: Clips, noise: Noise = None) -> Tensor:
        """Return each clip's normalised mean token, (B, D)."""
        return self.fc_norm(self.pool(clips, noise))

    def pool(self, clips: Clips, noise: Noise = None) -> Tensor:
        """Return the mean of each clip's encoded tokens, before the norm, (B, D): the encoder's features."""
        groups = self.group(clips)
        noises = self._check_noise(groups, noise)
        branch = self.num_branch_noise if self.training else 0
        scale_BL = branch_scales(torch.cat([n[:, :branch] for n in noises]), self.drop_path) if branch else None
        with torch.no_grad() if self.is_encoder_frozen else contextlib.nullcontext():
            kept = TokenSet.join(
                [self.select(group, n[:, branch:]) for group, n in zip(groups, noises, strict=True)]
            )
            x_MD = super().forward(groups, kept, scale_BL)
            return mean_per_clip(x_MD, kept)

    def select(self, group: ClipGroup, noise_BS: Tensor | None = None) -> TokenSet:
        """Return the kept tokens of each clip."""
        rule, clips_BCTHW = self.rule, group.clips_BCTHW
        importance_BN = self.rank(group, rule.distance) if rule.ranks_to_keep(group.grid) else None
        return rule.keep(group.grid, len(group), clips_BCTHW.device, noise_BS, importance_BN)

    def _check_noise(self, groups: Sequence[ClipGroup], noise: Noise) -> list[Tensor]:
        """Return the noise of each batch of clips; in evaluation the same for every clip."""
        if not self.training:
            return [
                fixed_draws(self.rule.keep_noise_length(group.grid))
                .to(group.clips_BCTHW.device)
                .expand(len(group), -1)
                for group in groups
            ]
        given = [noise] * len(groups) if noise is None or isinstance(noise, Tensor) else list(noise)
        checked = []
        for group, noise_BS in zip(groups, given, strict=True):
            expected = (len(group), self.num_noise(group.grid))
            if noise_BS is None and not expected[1]:
                noise_BS = group.clips_BCTHW.new_empty(expected, dtype=torch.float32)
            if noise_BS is None or noise_BS.shape != expected:
                has = "none" if noise_BS is None else f"noise of shape {tuple(noise_BS.shape)}"
                raise ValueError(
                    f"training with strategy={self.rule.strategy} and drop_path={self.drop_path} needs noise "
                    f"{expected}, got {has}"
                )
            checked.append(noise_BS)
        return checked


def fixed_draws(length: int) -> Tensor:
    """Return the noise of evaluation, the same for every clip, process and run, (length,) on the CPU."""
    return torch.rand(length, generator=torch.Generator().manual_seed(0), device="cpu")


def mean_per_clip(x_MD: Tensor, tokens: TokenSet) -> Tensor:
    """Average packed tokens over each clip, (B, D).

    Raises:
        ValueError: A clip has no tokens.
    """
    lengths = tokens.packing.lengths
    if min(lengths, default=0) < 1:
        raise ValueError("a clip without tokens has no mean")
    if len(set(lengths)) == 1:  # sums in float32 for any dtype, stores nothing for backward, deterministic
        return x_MD.view(len(lengths), lengths[0], -1).mean(dim=1)
    zeros_BD = torch.zeros(len(lengths), x_MD.shape[1], device=x_MD.device)
    sums_BD = zeros_BD.index_add(0, tokens.clip_M, x_MD.float())
    return (sums_BD / tokens.packing.cu_seqlens.diff()[:, None]).to(x_MD.dtype)
