"""Clips to tubelets, tubelets to embeddings, grid positions to sinusoids.

Place in the flow: the first step of the model. Axes: B clips, C channels, T frames, H W pixels, N tokens of a
clip, M clips or tubelets, R target tubelets, P = C * tubelet_size * patch_size**2 pixel values of a tubelet,
D width.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from everest_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD
from everest_ds.model.packing import TokenSet
from everest_ds.tokens import TokenGrid

CENTRE = 128
POSITIONS_AT_ONCE = 4096  # the float64 intermediates take nine times the memory of the result


@dataclass(frozen=True)
class ClipGroup:
    """Clips of one shape, and their token grid. A batch of clips of several shapes is several groups, in order.

    Attributes:
        clips_BCTHW: uint8, or floats in [0, 1]; not yet standardised.
        grid: The tokens of each.
    """

    clips_BCTHW: Tensor
    grid: TokenGrid

    def __len__(self) -> int:
        return len(self.clips_BCTHW)


def token_grid(clips_BCTHW: Tensor, *, tubelet_size: int, patch_size: int) -> TokenGrid:
    """Return the token grid of a batch of clips.

    Raises:
        ValueError: The tensor is not five-dimensional with three channels.
        UserError: The frames or pixels do not divide into tubelets.
    """
    if clips_BCTHW.ndim != 5 or clips_BCTHW.shape[1] != 3:
        raise ValueError(f"expected clips of shape (B, 3, T, H, W), got {tuple(clips_BCTHW.shape)}")
    num_frames, height, width = clips_BCTHW.shape[2:]
    return TokenGrid.of_clip(
        num_frames=num_frames, height=height, width=width, tubelet_size=tubelet_size, patch_size=patch_size
    )


def gather_tubelets(groups: Sequence[ClipGroup], tokens: TokenSet) -> Tensor:
    """Cut the tubelets of tokens out of clips of one or several shapes, copying nothing else.

    Returns:
        (M, C, tubelet_size, patch_size, patch_size) in the clips' dtype.
    """
    cuts, axes = [], "b c (t pt) (h ph) (w pw) -> b t h w c pt ph pw"
    for group, part in zip(groups, tokens.split([len(group) for group in groups]), strict=True):
        rows, cols = group.grid.rows, group.grid.cols
        blocks = rearrange(group.clips_BCTHW, axes, t=group.grid.time, h=rows, w=cols)
        step_M = torch.div(part.position_M, rows * cols, rounding_mode="floor")
        row_M = torch.div(part.position_M, cols, rounding_mode="floor") % rows
        cuts.append(blocks[part.clip_M, step_M, row_M, part.position_M % cols])
    return cuts[0] if len(cuts) == 1 else torch.cat(cuts)


def to_unit_range(pixels: Tensor) -> Tensor:
    """Return pixels as float32 in [0, 1]: uint8 is divided by 255, floats must be in [0, 1] already.

    Raises:
        ValueError: Another dtype. (A float's range is not checked, because that would synchronise.)
    """
    if pixels.dtype == torch.uint8:
        return pixels.float().div_(255)
    if pixels.is_floating_point():
        return pixels.float()
    raise ValueError(f"expected uint8 pixels or floats in [0, 1], got {pixels.dtype}")


def standardise(pixels_MCTHW: Tensor) -> Tensor:
    """Standardise clips or tubelets with ImageNet's mean and deviation; returns float32, a copy."""
    unit_MCTHW = to_unit_range(pixels_MCTHW)
    if unit_MCTHW is pixels_MCTHW:
        unit_MCTHW = pixels_MCTHW.clone()  # the next lines work in place
    for channel, mean, std in zip(unit_MCTHW.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel.sub_(mean).div_(std)
    return unit_MCTHW


def reconstruction_target(tubelets_RCTHW: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Return the decoder's targets: each tubelet's pixels, standardised per channel within the tubelet.

    Args:
        tubelets_RCTHW: uint8 or floats in [0, 1].
        eps: Added to the deviation (not to the variance).

    Returns:
        (R, P) float32, P over (frame, row, column, channel): the order of the official decoder's outputs.

    Source: official code, `normlize_target`: unbiased deviation over the pixels of one channel of one tubelet.
    """
    unit = to_unit_range(tubelets_RCTHW).flatten(2)
    centred = unit - unit.mean(dim=2, keepdim=True)
    # Fewer passes than `var`, which would take three quarters of this function's time on a CPU.
    deviation = torch.linalg.vector_norm(centred, dim=2, keepdim=True) / math.sqrt(unit.shape[2] - 1)
    return rearrange(centred / (deviation + eps), "r c p -> r (p c)")


def unstandardise(prediction_RP: Tensor, tubelets_RCTHW: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Undo `reconstruction_target`: return predicted pixels in the shape of the tubelets, float32, about [0, 1].

    Mean and deviation are those of the true tubelets, because the decoder predicts neither.
    """
    unit = to_unit_range(tubelets_RCTHW).flatten(2)
    prediction = rearrange(prediction_RP, "r (p c) -> r c p", c=unit.shape[1])
    deviation, mean = torch.std_mean(unit, dim=2, keepdim=True)
    return (prediction * (deviation + eps) + mean).view(tubelets_RCTHW.shape)


def embed_bytes(clips_BCTHW: Tensor, weight_DCthw: Tensor, bias_D: Tensor) -> Tensor:
    """Standardise uint8 clips and convolve them at a stride of the kernel's size, in float32's precision.

    It takes two bfloat16 matmuls: bytes are exact in bfloat16, and a weight is the sum of two bfloat16 numbers.

    Returns:
        (B, D, T / t, H / h, W / w) float32, whatever the kernel's dtype; in memory D comes last.
    """
    frames, height, width = weight_DCthw.shape[2:]
    num_steps, num_rows = clips_BCTHW.shape[2] // frames, clips_BCTHW.shape[3] // height
    tubelets = "b c (t pt) (h ph) (w pw) -> (b t h w) (c pt ph pw)"
    # A byte with its highest bit flipped, read as a signed byte, is the byte minus 128.
    # One expression, so that the rearranged bytes are freed before the matmuls.
    centred_MP = (
        (rearrange(clips_BCTHW, tubelets, pt=frames, ph=height, pw=width) ^ CENTRE)
        .view(torch.int8)
        .to(torch.bfloat16)
    )
    mean_C, std_C = (made_on(clips_BCTHW.device, values) for values in (IMAGENET_MEAN, IMAGENET_STD))
    weight_DCthw = weight_DCthw.float() / std_C[:, None, None, None]
    # The embedding of a clip whose bytes are all 128.
    grey_C = (CENTRE / 255 - mean_C)[:, None, None, None]
    centre_D = bias_D.float() + (weight_DCthw * grey_C).flatten(1).sum(dim=1)
    weight_DP = (weight_DCthw / 255).flatten(1)
    rounded_DP = weight_DP.to(torch.bfloat16)
    rest_DP = (weight_DP - rounded_DP.float()).to(torch.bfloat16)
    x_MD = exact_matmul(centred_MP, rest_DP).add_(centre_D).add_(exact_matmul(centred_MP, rounded_DP))
    return rearrange(x_MD, "(b t h w) d -> b d t h w", b=len(clips_BCTHW), t=num_steps, h=num_rows)


def made_on(device: torch.device, values: Sequence[float]) -> Tensor:
    """Return a few float32 numbers, created on the device without a copy from the host."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def exact_matmul(x_MP: Tensor, weight_DP: Tensor) -> Tensor:
    """Multiply a bfloat16 matrix with the transpose of another, (M, D) float32: only sums are rounded."""
    if x_MP.device.type == "cuda":
        return torch.mm(x_MP, weight_DP.T, out_dtype=torch.float32)
    return x_MP.float() @ weight_DP.float().T


@functools.cache
def has_exact_matmul(device: torch.device) -> bool:
    """Return whether a GPU multiplies bfloat16 matrices into float32; tried once a device.

    False for a CPU, where the convolution in float32 is as fast.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    # 2^12 + 1 does not fit into the 8 bits of bfloat16, nor into the 11 of TF32 or float16.
    x_MP = torch.tensor([[64.0, 1.0] + [0.0] * 14] * 16, dtype=torch.bfloat16, device=device)
    try:
        return bool((exact_matmul(x_MP, x_MP) == 64.0**2 + 1).all())
    except (RuntimeError, TypeError):  # this torch or GPU does not support it
        return False


class BlockConv3d(nn.Conv3d):
    """A Conv3d whose stride is its kernel size; an input of one kernel's size takes one matmul.

    Weights are converted to the input's dtype, so float32 pixels are embedded in float32 whatever the weights' own
    dtype. Bytes are standardised and embedded in float32.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel_size=kernel, stride=kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (M, C, t, h, w) into (M, D, t', h', w')."""
        assert self.bias is not None
        if x.dtype == torch.uint8:
            return embed_bytes(x, self.weight, self.bias)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if tuple(x.shape[2:]) == self.kernel_size:
            return F.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None, None]
        return F.conv3d(x, weight, bias, stride=self.stride)


class TubeletEmbedding(nn.Module):
    """Embeds tubelets: one Conv3d as wide as a tubelet, or a stack of smaller ones (paper Table 15).

    No kernel crosses a tubelet's edge, so whole clips (without gradient, to rank their tokens) and single tubelets
    (with gradient) are embedded in the same way. A GELU follows each layer but the last; the paper does not say
    which activation. With one layer the parameters are the official `patch_embed.proj`.
    """

    # Edges of the kernels before the last one; the first kernel spans all frames of the tubelet.
    STEM_EDGES: ClassVar[dict[int, tuple[int, ...]]] = {1: (), 2: (4,), 3: (4, 2)}

    def __init__(self, *, width: int, tubelet_size: int, patch_size: int, num_layers: int = 1) -> None:
        super().__init__()
        edges = self.STEM_EDGES[num_layers]
        last_edge, rest = divmod(patch_size, math.prod(edges))
        if rest:
            raise ValueError(f"patch_size={patch_size} is not a multiple of {math.prod(edges)}")
        kernels = [(1, edge, edge) for edge in (*edges, last_edge)]
        kernels[0] = (tubelet_size, *kernels[0][1:])
        channels = [3] + [width] * len(edges)
        layers = [BlockConv3d(c, width, k) for c, k in zip(channels, kernels, strict=True)]
        self.stem = nn.ModuleList(layers[:-1])
        self.proj = layers[-1]

    def embeds_bytes(self, clips_BCTHW: Tensor) -> bool:
        """Return whether uint8 clips are embedded directly: with one layer, on a device where that is faster."""
        return clips_BCTHW.dtype == torch.uint8 and not len(self.stem) and has_exact_matmul(clips_BCTHW.device)

    def forward(self, pixels_MCTHW: Tensor) -> Tensor:
        """Embed standardised clips or tubelets, (M, C, T, H, W) -> (M, tokens, D), in the input's dtype.

        uint8 clips are accepted if `embeds_bytes`. They are embedded in float32, without gradient.
        """
        x = pixels_MCTHW
        for layer in self.stem:
            x = F.gelu(layer(x))
        return rearrange(self.proj(x), "m d t h w -> m (t h w) d")


def sinusoid_positions(grid: TokenGrid, width: int) -> Tensor:
    """Return the fixed position embedding of a grid, (N, width) float32.

    One-dimensional sines and cosines over the token's position, sine in even and cosine in odd channels.

    Source: official code, `get_sinusoid_encoding_table`. The paper does not mention positions.
    """
    # In float64, because positions reach the thousands: a float32 exponent would change angles by 1e-4.
    channel = torch.arange(width)
    frequency = 10000.0 ** (-2 * torch.div(channel, 2, rounding_mode="floor").double() / width)
    table = []
    for position in torch.arange(grid.num_tokens, dtype=torch.float64).split(POSITIONS_AT_ONCE):
        angle = position[:, None] * frequency
        table.append(torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float())
    return torch.cat(table)


def interpolate_positions(table_ND: Tensor, grid: TokenGrid, to_grid: TokenGrid) -> Tensor:
    """Resample a grid's position table to another grid, trilinearly over time, rows and columns."""
    if grid == to_grid:
        return table_ND
    volume = rearrange(table_ND, "(t h w) d -> 1 d t h w", t=grid.time, h=grid.rows)
    size = (to_grid.time, to_grid.rows, to_grid.cols)
    resized = F.interpolate(volume.float(), size=size, mode="trilinear", align_corners=False)
    return rearrange(resized, "1 d t h w -> (t h w) d").to(table_ND.dtype)


def gather_positions(
    table_ND: Tensor, grid: TokenGrid, groups: Sequence[ClipGroup], tokens: TokenSet, dtype: torch.dtype
) -> Tensor:
    """Return the position embedding of tokens, (M, D) in ``dtype``.

    ``table_ND`` has the positions of ``grid``; they are interpolated for clips of other grids.
    """
    parts = tokens.split([len(group) for group in groups])
    rows = [
        interpolate_positions(table_ND, grid, group.grid).to(dtype)[part.position_M]
        for group, part in zip(groups, parts, strict=True)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
