"""The embedding of 8-bit clips at float32's precision, by products that a GPU's tensor cores compute.

Place in the flow: uint8 clips -> embeddings of all tokens, without gradient, float32 -> importance. Ranking needs
float32 (bfloat16 changes 1 to 14 % of the chosen tokens), but a GPU multiplies true float32 at a tenth of its speed
or less, and ranking all tokens would take a good part of a small model's step.

A byte less 128 is a whole number of at most 8 bits, which bfloat16 holds exactly; its product with a bfloat16
number is exact in float32, in which tensor cores add up. What the weights then lack is put right by a second
product: a float32 weight is a bfloat16 number and a rest, and the rest as a bfloat16 number leaves an error of
2^-17 of the weight, of which the 1,536 products of a sum average most away. The standardisation, (byte / 255 -
mean) / std, goes into weights and bias.

Axes: B clips, C channels, T frames, H W pixels, M tubelets, P = C * t * h * w pixel values of a tubelet, D width.
"""

import functools

import torch
from einops import rearrange
from torch import Tensor

CENTRE = 128
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def embed_bytes(clips_BCTHW: Tensor, weight_DCthw: Tensor, bias_D: Tensor) -> Tensor:
    """Standardise and embed all tubelets of 8-bit clips.

    Args:
        clips_BCTHW: uint8.
        weight_DCthw: The kernel of a convolution whose stride is its size, in any precision.
        bias_D: Its bias.

    Returns:
        (B, D, T / t, H / h, W / w) float32, as that convolution of standardised clips; in memory D comes last.
    """
    frames, height, width = weight_DCthw.shape[2:]
    num_steps, num_rows = clips_BCTHW.shape[2] // frames, clips_BCTHW.shape[3] // height
    tubelets = "b c (t pt) (h ph) (w pw) -> (b t h w) (c pt ph pw)"
    # A byte with its highest bit turned over is, read as a signed one, itself less 128.
    # The bytes are given no name, or they would lie beside the products.
    centred_MP = (
        (rearrange(clips_BCTHW, tubelets, pt=frames, ph=height, pw=width) ^ CENTRE)
        .view(torch.int8)
        .to(torch.bfloat16)
    )
    channels = torch.tensor([IMAGENET_MEAN, IMAGENET_STD])
    mean_C, std_C = channels.to(clips_BCTHW.device, non_blocking=True)[:, :, None, None, None]
    weight_DCthw = weight_DCthw.float() / std_C
    # What a clip of bytes that are all 128 is embedded to.
    centre_D = bias_D.float() + (weight_DCthw * (CENTRE / 255 - mean_C)).flatten(1).sum(dim=1)
    weight_DP = (weight_DCthw / 255).flatten(1)
    rounded_DP = weight_DP.to(torch.bfloat16)
    rest_DP = (weight_DP - rounded_DP.float()).to(torch.bfloat16)
    x_MD = exact_products(centred_MP, rest_DP).add_(centre_D).add_(exact_products(centred_MP, rounded_DP))
    return rearrange(x_MD, "(b t h w) d -> b d t h w", b=len(clips_BCTHW), t=num_steps, h=num_rows)


def exact_products(x_MP: Tensor, weight_DP: Tensor) -> Tensor:
    """Return bfloat16 numbers times the transpose of others in float32, (M, D): sums alone are rounded."""
    if x_MP.device.type == "cuda":
        return torch.mm(x_MP, weight_DP.T, out_dtype=torch.float32)
    return x_MP.float() @ weight_DP.float().T


@functools.cache
def multiplies_exactly(device: torch.device) -> bool:
    """Return whether a GPU gives products of bfloat16 numbers in float32; tried out, once a device.

    Of a CPU it is False: there the convolution in float32 is as fast.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    # 2^12 + 1 does not fit into the 8 bits of bfloat16, nor into the 11 of TF32 or float16.
    x_MP = torch.tensor([[64.0, 1.0] + [0.0] * 14] * 16, dtype=torch.bfloat16, device=device)
    try:
        return bool((exact_products(x_MP, x_MP) == 64.0**2 + 1).all())
    except (RuntimeError, TypeError):  # a torch or a GPU that cannot
        return False
