"""Augmentation of fine-tuning clips with timm's operations: one draw for all frames of a clip.

Place in the flow: frames_THWC uint8 -> RandAugment -> random resized crop and flip (transforms.py) -> clip_CTHW
uint8 -> random erasing -> mixing of pairs. timm draws from process-wide generators. Each call runs inside
`seeded_globals`, so that its draws belong to the sample. Axes: T frames, H W pixels, C colour channels, K classes.

timm is imported in functions: pre-training does not need it, and importing it takes each process half a second.
"""

import math
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from everest_ds.config import FinetuneDataConfig
from everest_ds.data.clips.sampling import RandomStream, SampleKey, keyed_generator
from everest_ds.data.clips.transforms import Crop
from everest_ds.errors import UserError
from everest_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD

_RAND_SECTION = re.compile(r"(m|n|mmax)\d+|(p|mstd)\d+(\.\d+)?|inc[01]|t(weights|3a|3aw)")


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's process-wide CPU generators, and restore their state afterwards.

    Without workers, clips are made in the training process, and must not change its random state.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def check_rand_augment(text: str) -> None:
    """Check a RandAugment configuration early: timm ignores some errors and raises the others in a worker.

    Raises:
        UserError: The text is not in timm's notation, or asks for more operations than timm's set contains.
    """
    first, *sections = text.split("-")
    matches = [_RAND_SECTION.fullmatch(section) for section in sections]
    fault = None
    if first != "rand":
        fault = "it must begin with 'rand'"
    elif not all(matches):
        fault = f"unknown part {sections[matches.index(None)]!r}"
    else:
        try:
            with seeded_globals(0):
                _rand_augment_transform(text)(Image.new("RGB", (8, 8)))
        except (AssertionError, ValueError) as error:
            fault = str(error) or "timm refuses it"
    if fault:
        raise UserError(
            f"data.rand_augment={text!r} is not in timm's notation: {fault}; expected rand, then any of m9 "
            "(magnitude), n2 (operations), p0.5 (probability), mstd0.5 (spread of the magnitude), mmax10 (its "
            "bound), inc1 (all operations grow with it), tweights, t3a or t3aw (set of operations), joined by '-', "
            "as in rand-m9-mstd0.5-inc1, or None for no RandAugment"
        )


def rand_augment(frames_THWC: NDArray[np.uint8], text: str, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Apply timm's RandAugment to each frame, with the same operations, magnitudes and signs.

    It runs on whole frames, before the crop, as in the official code: shifts and rotations can bring pixels into
    the crop, and the cost depends on the size of the frame.

    Source: official code, `create_random_augment`: bicubic, pixels from outside the frame are grey (128). Its
    translate_const has no effect on RandAugment's operations and is not passed.
    Differs from the official code: Posterize keeps at least one bit; at full strength it made a clip all black.
    """
    transform = _rand_augment_transform(text)
    seed = _draw_seed(generator)
    frames = []
    for frame_HWC in frames_THWC:
        with seeded_globals(seed):
            frames.append(np.asarray(transform(Image.fromarray(frame_HWC))))
    return np.stack(frames)


def draw_resized_crop(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], generator: np.random.Generator
) -> Crop:
    """Draw a crop of random area and aspect, with the same draws as torchvision's ``RandomResizedCrop``.

    The area is uniform in ``area`` (lowest and highest share of the frame), the aspect log-uniform in ``aspect``
    (lowest and highest width / height). After ten draws that do not fit, returns the largest centred crop whose
    aspect is allowed.
    """
    draws = torch.Generator().manual_seed(_draw_seed(generator))
    log_aspect = torch.tensor(aspect).log().tolist()
    for _ in range(10):
        pixels = width * height * torch.empty(1).uniform_(*area, generator=draws).item()
        ratio = torch.empty(1).uniform_(*log_aspect, generator=draws).exp().item()
        crop_width, crop_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(torch.randint(height - crop_height + 1, (1,), generator=draws))
            left = int(torch.randint(width - crop_width + 1, (1,), generator=draws))
            return left, top, crop_width, crop_height
    crop_width, crop_height = width, height
    if width / height < aspect[0]:
        crop_height = round(width / aspect[0])
    elif width / height > aspect[1]:
        crop_width = round(height * aspect[1])
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def erase(clip_CTHW: Tensor, prob: float, generator: np.random.Generator) -> Tensor:
    """Erase one box of random position and size, the same in all frames, with probability ``prob``: uint8.

    The box covers 2 to 33 % of a frame. It is filled with normal noise, drawn for every pixel, channel and frame.

    Source: official code, `RandomErasing` with mode pixel and one box.
    Differs from the official code: there the noise replaces normalised pixels. Here it is scaled to bytes with
    ImageNet's mean and standard deviation; values beyond black or white (two deviations away) are clamped.
    """
    from timm.data.random_erasing import RandomErasing

    channels, num_frames, height, width = clip_CTHW.shape
    # timm takes an image: frames become channels. Pixels outside the box stay NaN.
    noise = torch.full((channels * num_frames, height, width), torch.nan)
    with seeded_globals(_draw_seed(generator)):
        noise = RandomErasing(probability=prob, mode="pixel", max_count=1, device="cpu")(noise)
    pixels = (~noise[0].isnan()).nonzero().tolist()
    if not pixels:
        return clip_CTHW
    (top, left), (bottom, right) = pixels[0], pixels[-1]
    box = (..., slice(top, bottom + 1), slice(left, right + 1))
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    noise_CTHW = rearrange(noise, "(c t) h w -> c t h w", c=channels)[box]
    erased_CTHW = clip_CTHW.clone()
    erased_CTHW[box] = ((noise_CTHW * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return erased_CTHW


@dataclass(frozen=True, kw_only=True)
class PairMixer:
    """Mixes pairs of neighbouring clips and their classes, with timm's mixup and CutMix.

    Draws are keyed by the pair, so the global batch does not depend on the micro-batch (if even) or the number of
    processes. All frames of a clip are mixed alike. Every pair is mixed; if mixup and CutMix are both on, each is
    chosen with probability 0.5.

    Attributes:
        seed: Seed of the run.
        num_classes: K.
        mixup_alpha: Parameter of mixup's beta distribution; 0 turns mixup off.
        cutmix_alpha: Parameter of CutMix's beta distribution; 0 turns CutMix off.

    Differs from the official code: there one draw mixes a rank's whole micro-batch, its first clip with its last
    and so on, as normalised floats; here each pair has its own draw, and bytes are mixed, rounded to the nearest.
    """

    seed: int
    num_classes: int
    mixup_alpha: float
    cutmix_alpha: float

    @classmethod
    def of(cls, data: FinetuneDataConfig, *, seed: int, num_classes: int) -> "PairMixer | None":
        """Return the mixer of a configuration; None if nothing is mixed."""
        if not data.mixes:
            return None
        return cls(seed=seed, num_classes=num_classes, mixup_alpha=data.mixup_alpha, cutmix_alpha=data.cutmix_alpha)

    def mix(self, first: Tensor, second: Tensor, labels: tuple[int, int], key: SampleKey) -> tuple[Tensor, Tensor]:
        """Mix two clips, each clip_CTHW uint8; ``key`` is the key of the first.

        Returns:
            The two as clips_BCTHW uint8, and target_BK float32: a row contains the shares of the classes.
        """
        from timm.data.mixup import FastCollateMixup

        collate = FastCollateMixup(
            mixup_alpha=self.mixup_alpha,
            cutmix_alpha=self.cutmix_alpha,
            mode="pair",
            label_smoothing=0.0,
            num_classes=self.num_classes,
        )
        # timm mixes in place.
        images = [rearrange(clip, "c t h w -> (c t) h w").numpy().copy() for clip in (first, second)]
        generator = keyed_generator(self.seed, RandomStream.MIX, key.epoch, key.index, key.repeat)
        with seeded_globals(_draw_seed(generator)):
            mixed, target_BK = collate(list(zip(images, labels, strict=True)))
        return rearrange(mixed, "b (c t) h w -> b c t h w", c=first.shape[0]), target_BK

    def target(self, label: int) -> Tensor:
        """Return the one-hot target_K of a clip that is not mixed, float32."""
        return torch.nn.functional.one_hot(torch.tensor(label), self.num_classes).float()


def _draw_seed(generator: np.random.Generator) -> int:
    return int(generator.integers(2**32))


@lru_cache(maxsize=4)
def _rand_augment_transform(text: str) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    transform = rand_augment_transform(text, {"interpolation": Image.Resampling.BICUBIC})
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """Keep at least one bit: timm asks for none at the ends of its scale, which Pillow 13 refuses."""
    return ImageOps.posterize(image, min(max(bits_to_keep, 1), 8))
