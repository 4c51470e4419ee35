"""Cuts: which frames of a video make a training clip, and how they become one; one cut for each task.

Place in the flow: how many frames there are -> which of them are read; frames_THWC uint8 -> clip_CTHW uint8, all
draws being the sample's. Cuts are small and picklable: each loader process gets a copy. Axes: T frames, H W pixels,
C colour channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from everest_ds.config import FinetuneDataConfig, PretrainDataConfig
from everest_ds.config.sections import DataConfig
from everest_ds.data.clips.augment import check_rand_augment, draw_resized_crop, erase, rand_augment
from everest_ds.data.clips.sampling import RandomStream, dense_indices, segment_indices, stride_indices
from everest_ds.data.clips.transforms import crop_frames, draw_crop, resize_crop, resize_crop_by_pil
from everest_ds.data.readers.timing import timed_indices

Draws = Callable[[RandomStream], np.random.Generator]
"""Gives the sample's generator for a purpose."""

# The largest crop that may travel to the device as it is: a frame of full high definition.
_LARGEST_CROP_PX = 1920 * 1080


class UnfitFramesError(ValueError):
    """Frames that no clip can be cut from; the message says why."""


class Cut(Protocol):
    """Chooses frames of a video, and turns them into a clip."""

    @property
    def config(self) -> DataConfig:
        """How a clip is cut."""

    @property
    def delivers_crops(self) -> bool:
        """Whether `clip` gives crop_THWC, which the device resizes, instead of clip_CTHW."""

    @property
    def most_bytes(self) -> int:
        """Bytes of what `clip` gives, at most."""

    def frame_idx(self, num_frames: int, draws: Draws) -> list[int]:
        """Choose the frames of a clip by their number; a short video's last one may repeat."""

    def frame_idx_in_time(self, times_s: NDArray[np.float64], draws: Draws) -> list[int]:
        """Choose the frames of a clip by the times in seconds at which they start (data.sampling_seconds)."""

    def clip(self, frames_THWC: NDArray[np.uint8], draws: Draws) -> Tensor:
        """Cut the clip, uint8; ``frames_THWC`` is left as it is.

        Raises:
            UnfitFramesError: No clip can be had of the frames.
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

    @property
    def delivers_crops(self) -> bool:
        """Whether the device resizes."""
        return self.config.resize == "device"

    @property
    def most_bytes(self) -> int:
        """Bytes of a clip, or of the largest crop."""
        frame_px = _LARGEST_CROP_PX if self.delivers_crops else self.config.image_size**2
        return self.num_frames * frame_px * 3

    def frame_idx(self, num_frames: int, draws: Draws) -> list[int]:
        """Choose ``self.num_frames`` frames."""
        return stride_indices(num_frames, self.num_frames, self.config.sampling_stride, draws(RandomStream.FRAMES))

    def frame_idx_in_time(self, times_s: NDArray[np.float64], draws: Draws) -> list[int]:
        """Choose ``self.num_frames`` frames."""
        return _choose_in_time(times_s, self.num_frames, self.config, draws)

    def clip(self, frames_THWC: NDArray[np.uint8], draws: Draws) -> Tensor:
        """Cut the clip, or its crop."""
        config = self.config
        height, width = frames_THWC.shape[1:3]
        crop = draw_crop(width, height, config.image_size, config.crop_scales, draws(RandomStream.CROP))
        _require_pixels(crop, width, height)
        if self.delivers_crops and crop[2] * crop[3] > _LARGEST_CROP_PX:
            raise UnfitFramesError(
                f"its crops of {crop[2]}x{crop[3]} pixels are too large for data.resize=device; take fast, or "
                "make the videos smaller with `everest prepare`"
            )
        mirror = config.flip and draws(RandomStream.FLIP).random() < 0.5
        crop_THWC = crop_frames(frames_THWC, crop, mirror=mirror)
        if self.delivers_crops:
            return crop_THWC
        resize = resize_crop_by_pil if config.resize == "compat" else resize_crop
        return resize(crop_THWC, config.image_size)


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

    @property
    def delivers_crops(self) -> bool:
        """Whether the device resizes: it does not, clips are erased and mixed before they get there."""
        return False

    @property
    def most_bytes(self) -> int:
        """Bytes of a clip."""
        return self.config.num_frames * self.config.image_size**2 * 3

    def frame_idx(self, num_frames: int, draws: Draws) -> list[int]:
        """Choose ``config.num_frames`` frames."""
        config, generator = self.config, draws(RandomStream.FRAMES)
        if config.sampling == "segment":
            return segment_indices(num_frames, config.num_frames, generator)
        return dense_indices(num_frames, config.num_frames, config.sampling_stride, generator)

    def frame_idx_in_time(self, times_s: NDArray[np.float64], draws: Draws) -> list[int]:
        """Choose ``config.num_frames`` frames."""
        return _choose_in_time(times_s, self.config.num_frames, self.config, draws)

    def clip(self, frames_THWC: NDArray[np.uint8], draws: Draws) -> Tensor:
        """Augment the frames and cut the clip."""
        config = self.config
        height, width = frames_THWC.shape[1:3]
        if config.rand_augment is not None:
            frames_THWC = rand_augment(frames_THWC, config.rand_augment, draws(RandomStream.AUGMENT))
        crop = draw_resized_crop(width, height, config.crop_area, config.crop_aspect, draws(RandomStream.CROP))
        _require_pixels(crop, width, height)
        mirror = config.flip and draws(RandomStream.FLIP).random() < 0.5
        crop_THWC = crop_frames(frames_THWC, crop, mirror=mirror)
        clip_CTHW = resize_crop(crop_THWC, config.image_size)
        if config.erase_prob > 0:
            clip_CTHW = erase(clip_CTHW, config.erase_prob, draws(RandomStream.ERASE))
        return clip_CTHW


class Timeline(Protocol):
    """A video, or a window of one, as far as frames are chosen from it."""

    num_frames: int

    def times_s(self) -> NDArray[np.float64]:
        """Return when each frame starts, in seconds from the first one, ascending."""


def choose_frames(cut: Cut, video: Timeline, draws: Draws) -> list[int]:
    """Return the frames of a clip: in time where data.sampling_seconds is set, else by number.

    Raises:
        VideoReadError: The times cannot be had.
    """
    if cut.config.sampling_seconds is not None:
        return cut.frame_idx_in_time(video.times_s(), draws)
    return cut.frame_idx(video.num_frames, draws)


def _choose_in_time(times_s: NDArray[np.float64], clip_length: int, config: DataConfig, draws: Draws) -> list[int]:
    if config.sampling_seconds is None:
        raise ValueError("data.sampling_seconds is not set: frames are chosen by number")
    return timed_indices(times_s, clip_length, config.sampling_seconds, draws(RandomStream.FRAMES))


def _require_pixels(crop: tuple[int, int, int, int], width: int, height: int) -> None:
    if min(crop[2:]) < 1:
        raise UnfitFramesError(f"its frames of {width}x{height} pixels are too small to crop")
