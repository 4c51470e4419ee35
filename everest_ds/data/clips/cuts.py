"""Cuts: choose the frames of a training clip, then crop and augment them; each task has its cut.

Place in the flow: video -> frame numbers; frames_THWC uint8 -> clip_CTHW uint8. All draws are keyed by the sample.
Each worker gets a copy of the cut. Axes: T frames, H W pixels, C colour channels.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from everest_ds.config import FinetuneDataConfig, PretrainDataConfig
from everest_ds.config.sections import DataConfig
from everest_ds.data.clips.augment import check_rand_augment, draw_resized_crop, erase, rand_augment
from everest_ds.data.clips.sampling import Draws, RandomStream, dense_frames, segment_frames, strided_frames
from everest_ds.data.clips.transforms import Crop, crop_frames, draw_crop, resize_crop, resize_crop_by_pil
from everest_ds.data.readers.timing import timed_indices

# The largest crop that is copied to the device unresized: a full-HD frame.
_LARGEST_CROP_PX = 1920 * 1080


class UnfitFramesError(ValueError):
    """The frames cannot be cropped; the message says why."""


class Timeline(Protocol):
    """What choosing frames needs of a video or a window of it: the number of frames and their times."""

    num_frames: int

    def times_s(self) -> NDArray[np.float64]:
        """Return when each frame starts, in seconds from the first one, ascending."""


@dataclass(frozen=True)
class Cut(ABC):
    """Chooses frames of a video, and turns them into a clip.

    Attributes:
        config: How a clip is cut. ``config.num_frames`` frames are read; they may be candidates of which the model
            chooses some (`PretrainConfig.candidate_frames`).
    """

    config: DataConfig

    @property
    def delivers_crops(self) -> bool:
        """Whether `clip` returns crop_THWC, which the device resizes, instead of clip_CTHW."""
        return False

    @property
    def max_bytes(self) -> int:
        """Largest number of bytes that `clip` returns."""
        frame_px = _LARGEST_CROP_PX if self.delivers_crops else self.config.image_size**2
        return self.config.num_frames * frame_px * 3

    def choose_frames(self, video: Timeline, draws: Draws) -> list[int]:
        """Return the frame numbers of a clip: sampled by time if data.sampling_seconds is set, else by number.

        Raises:
            VideoReadError: The times cannot be read.
        """
        seconds, generator = self.config.sampling_seconds, draws(RandomStream.FRAMES)
        if seconds is not None:
            return timed_indices(video.times_s(), self.config.num_frames, seconds, generator)
        return self.frames_by_number(video.num_frames, generator)

    @abstractmethod
    def frames_by_number(self, num_frames: int, generator: np.random.Generator) -> list[int]:
        """Return the frame numbers of a clip; a short video may repeat its last frame."""

    @abstractmethod
    def clip(self, frames_THWC: NDArray[np.uint8], draws: Draws) -> Tensor:
        """Cut the clip, uint8; ``frames_THWC`` is not modified.

        Raises:
            UnfitFramesError: The frames are too small or too large to crop.
        """

    def _crop(self, frames_THWC: NDArray[np.uint8], crop: Crop, draws: Draws) -> Tensor:
        """Crop all frames, and mirror half of the clips: crop_THWC."""
        if min(crop[2:]) < 1:
            height, width = frames_THWC.shape[1:3]
            raise UnfitFramesError(f"its frames of {width}x{height} pixels are too small to crop")
        mirror = self.config.flip and draws(RandomStream.FLIP).random() < 0.5
        return crop_frames(frames_THWC, crop, mirror=mirror)


@dataclass(frozen=True)
class PretrainCut(Cut):
    """Strided or timed frames; one MultiScaleCrop and one flip for all frames of a clip."""

    config: PretrainDataConfig

    @property
    def delivers_crops(self) -> bool:
        return self.config.resize == "device"

    def frames_by_number(self, num_frames: int, generator: np.random.Generator) -> list[int]:
        return strided_frames(num_frames, self.config.num_frames, self.config.sampling_stride, generator)

    def clip(self, frames_THWC: NDArray[np.uint8], draws: Draws) -> Tensor:
        """Return the resized clip_CTHW, or crop_THWC if the device resizes."""
        config = self.config
        height, width = frames_THWC.shape[1:3]
        crop = draw_crop(width, height, config.image_size, config.crop_scales, draws(RandomStream.CROP))
        if self.delivers_crops and crop[2] * crop[3] > _LARGEST_CROP_PX:
            raise UnfitFramesError(
                f"its crops of {crop[2]}x{crop[3]} pixels are too large for data.resize=device; use fast, or "
                "make the videos smaller with `everest prepare`"
            )
        crop_THWC = self._crop(frames_THWC, crop, draws)
        if self.delivers_crops:
            return crop_THWC
        resize = resize_crop_by_pil if config.resize == "compat" else resize_crop
        return resize(crop_THWC, config.image_size)


@dataclass(frozen=True)
class FinetuneCut(Cut):
    """Dense or segment sampling, RandAugment, random resized crop, flip, random erasing, in the official order.

    Erasing and mixing run on the host and need resized clips, so crops are never resized on the device.

    Differs from the official code: the crop is resized on bytes, with antialiasing.

    Raises:
        UserError: data.rand_augment is not in timm's notation.
    """

    config: FinetuneDataConfig

    def __post_init__(self) -> None:
        if self.config.rand_augment is not None:  # it would fail in a worker
            check_rand_augment(self.config.rand_augment)

    def frames_by_number(self, num_frames: int, generator: np.random.Generator) -> list[int]:
        config = self.config
        if config.sampling == "segment":
            return segment_frames(num_frames, config.num_frames, generator)
        return dense_frames(num_frames, config.num_frames, config.sampling_stride, generator)

    def clip(self, frames_THWC: NDArray[np.uint8], draws: Draws) -> Tensor:
        """Augment the frames and cut the clip."""
        config = self.config
        height, width = frames_THWC.shape[1:3]
        if config.rand_augment is not None:
            frames_THWC = rand_augment(frames_THWC, config.rand_augment, draws(RandomStream.AUGMENT))
        crop = draw_resized_crop(width, height, config.crop_area, config.crop_aspect, draws(RandomStream.CROP))
        clip_CTHW = resize_crop(self._crop(frames_THWC, crop, draws), config.image_size)
        if config.erase_prob > 0:
            clip_CTHW = erase(clip_CTHW, config.erase_prob, draws(RandomStream.ERASE))
        return clip_CTHW
