"""The official loaders' way to a pre-training clip, for comparison alone: decord, PIL and normalised floats.

Written from its description: decord decodes with one thread, each frame becomes a PIL image, is cropped and resized
by itself, and the stack of them a float tensor that is normalised by ImageNet's statistics. Frames and crops are
those of our own clip. Axes: B clips, T frames, H W pixels, C colour channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import decord
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from everest_ds.benchmark.stages import StageTimer, draws_of, time_copy
from everest_ds.data.clips.cuts import PretrainCut
from everest_ds.data.clips.sampling import RandomStream
from everest_ds.data.clips.transforms import draw_crop
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.base import first_line
from everest_ds.data.readers.video import VideoReadError
from everest_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class OfficialWay:
    """The official way.

    Attributes:
        rows: The list; rows have no window, which the official loaders do not know.
        cut: Says which frames and which crop.
        seed: Seed of these draws.
        device: GPU that batches are copied to; None for none.
    """

    rows: Sequence[VideoRow]
    cut: PretrainCut
    seed: int
    device: torch.device | None = None
    name: str = "official"
    repeats: int = 1

    def make_batch(self, rows: Sequence[int], timer: StageTimer) -> Tensor:
        """Make float32 clips; see `everest_ds.benchmark.stages.Way.make_batch`."""
        clips = [self._clip(row, timer) for row in rows]
        with timer.stage("collate"):
            clips_BCTHW = torch.stack(clips)
            if self.device is not None:
                clips_BCTHW = clips_BCTHW.pin_memory()
        return time_copy(partial(clips_BCTHW.to, non_blocking=True), self.device, timer)

    def _clip(self, index: int, timer: StageTimer) -> Tensor:
        path, draws = self.rows[index].path, draws_of(self.seed, index)
        try:
            with timer.stage("open"):
                reader: Any = decord.VideoReader(str(path.absolute()), num_threads=1)
            with timer.stage("decode"):
                frame_idx = self.cut.frames_by_number(len(reader), draws(RandomStream.FRAMES))
                frames_THWC: NDArray[np.uint8] = reader.get_batch(frame_idx).asnumpy()
                del reader  # to close it is part of the cost
        except (OSError, RuntimeError, ValueError, decord.DECORDError) as error:
            raise VideoReadError(Path(path), first_line(error)) from error
        with timer.stage("augment"):
            config, (height, width) = self.cut.config, frames_THWC.shape[1:3]
            crop = draw_crop(width, height, config.image_size, config.crop_scales, draws(RandomStream.CROP))
            return official_clip(frames_THWC, crop, config.image_size)


def official_clip(frames_THWC: NDArray[np.uint8], crop: tuple[int, int, int, int], size: int) -> Tensor:
    """Crop and resize every frame as a PIL image, stack, scale to [0, 1] and normalise.

    Args:
        frames_THWC: uint8, RGB.
        crop: Left, top, width and height in pixels.
        size: Height and width of the clip in pixels.

    Returns:
        clip_CTHW, float32, contiguous.
    """
    left, top, width, height = crop
    images = [Image.fromarray(frame_HWC).convert("RGB") for frame_HWC in frames_THWC]
    images = [image.crop((left, top, left + width, top + height)) for image in images]
    images = [image.resize((size, size), Image.Resampling.BILINEAR) for image in images]
    stacked_THWC = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    clip_CTHW = stacked_THWC.permute(3, 0, 1, 2).contiguous().float().div(255)
    for channel_THW, mean, std in zip(clip_CTHW, IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel_THW.sub_(mean).div_(std)
    return clip_CTHW
