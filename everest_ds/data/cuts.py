"""Cuts: what turns an opened video into a training clip, one for each task.

Place in the flow: Video and the sample's draws -> clip_CTHW uint8 and the frames of the video that it is made of.
Cuts are small and picklable: each loader process gets a copy. Axes: T frames, H W pixels, C colour channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from everest_ds.config import FinetuneDataConfig, PretrainDataConfig
from everest_ds.config.sections import DataConfig
from everest_ds.data.augment import check_rand_augment, draw_resized_crop, erase, rand_augment
from everest_ds.data.sampling import Stream, dense_indices, segment_indices, stride_indices
from everest_ds.data.transforms import draw_crop, make_clip
from everest_ds.data.video import Video, VideoReadError

Draws = Callable[[Stream], np.random.Generator]
"""Gives the sample's generator for a purpose."""


class CutClip(NamedTuple):
    """A clip, and where it comes from.

    Attributes:
        clip_CTHW: uint8.
        frame_idx: Frame of the video that each frame of the clip is; a short video's last one may repeat.
    """

    clip_CTHW: Tensor
    frame_idx: list[int]


class Cut(Protocol):
    """Turns an opened video into a clip."""

    @property
    def config(self) -> DataConfig:
        """How a clip is cut."""

    def __call__(self, video: Video, draws: Draws) -> CutClip:
        """Cut a clip.

        Raises:
            VideoReadError: No clip can be had of the video.
        """


@dataclass(frozen=True)
class PretrainCut:
    """Frames at a stride, one MultiScaleCrop and one flip for all of them.

    Attributes:
        config: How a clip is cut.
        num_frames: Frames that are read: those of a clip, or more, from which the model chooses the clip's
            (`PretrainConfig.candidate_frames`).
    """

    config: PretrainDataConfig
    num_frames: int

    def __call__(self, video: Video, draws: Draws) -> CutClip:
        """Cut a clip of ``num_frames`` frames."""
        config = self.config
        frame_idx = stride_indices(video.num_frames, self.num_frames, config.sampling_stride, draws(Stream.FRAMES))
        frames_THWC = video.read(frame_idx)
        height, width = frames_THWC.shape[1:3]
        crop = draw_crop(width, height, config.image_size, config.crop_scales, draws(Stream.CROP))
        _require_pixels(video, crop, width, height)
        mirror = config.flip and draws(Stream.FLIP).random() < 0.5
        return CutClip(make_clip(frames_THWC, crop, config.image_size, mirror=mirror), frame_idx)


@dataclass(frozen=True)
class FinetuneCut:
    """Dense or segment sampling, RandAugment, random resized crop, flip, random erasing, in the official order.

    Differs from the official code: the crop is resized on bytes, with antialiasing.

    Raises:
        UserError: data.rand_augment is not in timm's notation.
    """

    config: FinetuneDataConfig

    def __post_init__(self) -> None:
        """Check what would else be found in a loader process."""
        if self.config.rand_augment is not None:
            check_rand_augment(self.config.rand_augment)

    def __call__(self, video: Video, draws: Draws) -> CutClip:
        """Cut a clip of ``config.num_frames`` frames."""
        config = self.config
        frame_idx = self._frame_idx(video.num_frames, draws(Stream.FRAMES))
        frames_THWC = video.read(frame_idx)
        height, width = frames_THWC.shape[1:3]
        if config.rand_augment is not None:
            frames_THWC = rand_augment(frames_THWC, config.rand_augment, draws(Stream.AUGMENT))
        crop = draw_resized_crop(width, height, config.crop_area, config.crop_aspect, draws(Stream.CROP))
        _require_pixels(video, crop, width, height)
        mirror = config.flip and draws(Stream.FLIP).random() < 0.5
        clip_CTHW = make_clip(frames_THWC, crop, config.image_size, mirror=mirror)
        if config.erase_prob > 0:
            clip_CTHW = erase(clip_CTHW, config.erase_prob, draws(Stream.ERASE))
        return CutClip(clip_CTHW, frame_idx)

    def _frame_idx(self, num_frames: int, generator: np.random.Generator) -> list[int]:
        if self.config.sampling == "segment":
            return segment_indices(num_frames, self.config.num_frames, generator)
        return dense_indices(num_frames, self.config.num_frames, self.config.sampling_stride, generator)


def _require_pixels(video: Video, crop: tuple[int, int, int, int], width: int, height: int) -> None:
    if min(crop[2:]) < 1:
        raise VideoReadError(video.path, f"its frames of {width}x{height} pixels are too small to crop")
