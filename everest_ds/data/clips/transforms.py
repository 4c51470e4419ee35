"""Crop, flip and resize of decoded frames: one crop and one flip for all frames of a clip, uint8 throughout.

Place in the flow: frames_THWC uint8 -> crop_THWC uint8 -> clip_CTHW uint8. Axes: T frames, H W pixels, C colour.
"""

import platform
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Crop = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""

# A crop edge less than this many pixels from the output size becomes the output size (MultiScaleCrop).
_SNAP_PX = 3


def multi_scale_crops(width: int, height: int, size: int, scales: Sequence[float]) -> list[tuple[int, int]]:
    """Return the crop sizes (width, height) that MultiScaleCrop draws from.

    These are all pairs of edges whose scales are equal or neighbours in the list of scales.

    Source: official code, `GroupMultiScaleCrop` with max_distort 1 (golden multiscale_crop.json).
    Differs from the official code: a frame one or two pixels smaller than the output is not padded with black.
    """
    shorter = min(width, height)
    edges = [int(shorter * scale) for scale in scales]
    if size <= shorter:
        edges = [size if abs(edge - size) < _SNAP_PX else edge for edge in edges]
    return [(edges[j], edges[i]) for i in range(len(edges)) for j in range(len(edges)) if abs(i - j) <= 1]


def crop_offsets(width: int, height: int, crop_width: int, crop_height: int) -> list[tuple[int, int]]:
    """Return the thirteen positions (left, top) of a crop that MultiScaleCrop draws from, in the official order."""
    step_x = (width - crop_width) // 4
    step_y = (height - crop_height) // 4
    steps = [
        (0, 0), (4, 0), (0, 4), (4, 4), (2, 2),  # corners and centre
        (0, 2), (4, 2), (2, 4), (2, 0),  # middles of the edges
        (1, 1), (3, 1), (1, 3), (3, 3),  # between centre and corners
    ]  # fmt: skip
    return [(x * step_x, y * step_y) for x, y in steps]


def draw_crop(width: int, height: int, size: int, scales: Sequence[float], generator: np.random.Generator) -> Crop:
    """Draw MultiScaleCrop's crop of a frame."""
    pairs = multi_scale_crops(width, height, size, scales)
    crop_width, crop_height = pairs[generator.integers(len(pairs))]
    offsets = crop_offsets(width, height, crop_width, crop_height)
    left, top = offsets[generator.integers(len(offsets))]
    return left, top, crop_width, crop_height


def crop_frames(frames_THWC: NDArray[np.uint8], crop: Crop, *, mirror: bool) -> Tensor:
    """Crop all frames alike, and mirror them left to right on request: crop_THWC uint8, contiguous."""
    left, top, width, height = crop
    crop_THWC = torch.from_numpy(frames_THWC)[:, top : top + height, left : left + width]
    return crop_THWC.flip(2) if mirror else crop_THWC.contiguous()


def resize_crop(crop_THWC: Tensor, size: int) -> Tensor:
    """Resize to ``size`` x ``size`` with antialiased bilinear weights, on the crop's device.

    Returns:
        clip_CTHW, uint8; channels are last in memory, as in the crop.

    Differs from the official code: uint8 tensors instead of PIL images, several times as fast; pixels differ by at
    most 2 of 255.
    """
    crop_TCHW = rearrange(crop_THWC, "t h w c -> t c h w")
    return rearrange(resize_frames(crop_TCHW, size, size), "t c h w -> c t h w")


def resize_frames(frames_TCHW: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 frames with antialiased bilinear weights, on their device, like torchvision's ``resize``.

    torchvision itself is not imported: it loads torch's compiler, which takes each process a second.
    """
    if frames_TCHW.shape[-2:] == (height, width):
        return frames_TCHW
    # torch resizes bytes fast only on CPUs with these vector instructions; elsewhere floats are faster.
    on_bytes = frames_TCHW.device.type == "cpu" and (
        torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")
    )
    pixels = frames_TCHW if on_bytes else frames_TCHW.float()
    resized = F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)
    return resized if on_bytes else resized.round_().to(torch.uint8)


def resize_crop_by_pil(crop_THWC: Tensor, size: int) -> Tensor:
    """Resize like `resize_crop`, with PIL: pixels are identical to the official code's."""
    images = [Image.fromarray(frame_HWC) for frame_HWC in crop_THWC.numpy()]
    frames = [np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) for image in images]
    return rearrange(torch.from_numpy(np.stack(frames)), "t h w c -> c t h w")
