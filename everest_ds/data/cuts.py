"""Cuts: what turns an opened video into a training clip, one for each task.

Place in the flow: Video and the sample's draws -> clip_CTHW uint8 and the frames of the video that it is made of.
Cuts are small and picklable: each loader process gets a copy. Axes: T frames, H W pixels, C colour channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
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
    """Turns an opened video into a clip, in two steps that can also be taken one by one."""

    @property
    def config(self) -> DataConfig:
        """How a clip is cut."""

    def __call__(self, video: Video, draws: Draws) -> CutClip:
        """Cut a clip.

        Raises:
            VideoReadError: No clip can be had of the video.
        """

    def frame_idx(self, num_frames: int, draws: Draws) -> list[int]:
        """Draw which frames of a video of ``num_frames`` make up a clip."""

    def clip(self, frames_THWC: NDArray[np.uint8], draws: Draws) -> Tensor:
        """Make a clip of these frames.

        Returns:
            clip_CTHW, uint8.

        Raises:
            FramesTooSmallError: They have not enough pixels to crop.
        """


class FramesTooSmallError(ValueError):
    """Frames that have not enough pixels to crop; the message says how large they are."""


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
        return _cut(self, video, draws)

    def frame_idx(self, num_frames: int, draws: Draws) -> list[int]:
        """Draw the frames of a clip; see `Cut.frame_idx`."""
        return stride_indices(num_frames, self.num_frames, self.config.sampling_stride, draws(Stream.FRAMES))

    def clip(self, frames_THWC: NDArray[np.uint8], draws: Draws) -> Tensor:
        """Crop, resize and flip; see `Cut.clip`."""
        config = self.config
        height, width = frames_THWC.shape[1:3]
        crop = draw_crop(width, height, config.image_size, config.crop_scales, draws(Stream.CROP))
        _require_pixels(crop, width, height)
        mirror = config.flip and draws(Stream.FLIP).random() < 0.5
        return make_clip(frames_THWC, crop, config.image_size, mirror=mirror)


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
        return _cut(self, video, draws)

    def frame_idx(self, num_frames: int, draws: Draws) -> list[int]:
        """Draw the frames of a clip; see `Cut.frame_idx`."""
        config, generator = self.config, draws(Stream.FRAMES)
        if config.sampling == "segment":
            return segment_indices(num_frames, config.num_frames, generator)
        return dense_indices(num_frames, config.num_frames, config.sampling_stride, generator)

    def clip(self, frames_THWC: NDArray[np.uint8], draws: Draws) -> Tensor:
        """Augment, crop, resize, flip and erase; see `Cut.clip`."""
        config = self.config
        height, width = frames_THWC.shape[1:3]
        if config.rand_augment is not None:
            frames_THWC = rand_augment(frames_THWC, config.rand_augment, draws(Stream.AUGMENT))
        crop = draw_resized_crop(width, height, config.crop_area, config.crop_aspect, draws(Stream.CROP))
        _require_pixels(crop, width, height)
        mirror = config.flip and draws(Stream.FLIP).random() < 0.5
        clip_CTHW = make_clip(frames_THWC, crop, config.image_size, mirror=mirror)
        if config.erase_prob > 0:
            clip_CTHW = erase(clip_CTHW, config.erase_prob, draws(Stream.ERASE))
        return clip_CTHW


def _cut(cut: Cut, video: Video, draws: Draws) -> CutClip:
    frame_idx = cut.frame_idx(video.num_frames, draws)
    try:
        return CutClip(cut.clip(video.read(frame_idx), draws), frame_idx)
    except FramesTooSmallError as error:
        raise VideoReadError(video.path, str(error)) from error


def _require_pixels(crop: tuple[int, int, int, int], width: int, height: int) -> None:
    if min(crop[2:]) < 1:
        raise FramesTooSmallError(f"its frames of {width}x{height} pixels are too small to crop")
