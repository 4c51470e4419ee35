"""The views that a video is scored on: several clips over time, several crops over space, nothing random.

Place in the flow: row of a list -> video opened once, each frame decoded and resized once -> clips_VCTHW uint8.
Axes: V views of a video (time first, then space), C colour channels, F decoded frames, T frames of a clip, H W
pixels.

Source: official code, the test mode of its two fine-tuning datasets (golden frame_sampling.json). Ours also allows
one view, for which the official code divides by zero, and any number of segment clips instead of two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from everest_ds.config import FinetuneDataConfig, ViewsConfig
from everest_ds.data.clips.sampling import require_frames
from everest_ds.data.clips.transforms import resize_frames
from everest_ds.data.lists.video_list import VideoRow, packed
from everest_ds.data.loading.loader import Loader, SampleMaker
from everest_ds.data.loading.pool import Mark
from everest_ds.data.readers.base import NO_MEMORY, is_lack_of_memory
from everest_ds.data.readers.choice import choose_reader
from everest_ds.data.readers.timing import clip_room_s, frames_at
from everest_ds.data.readers.video import Video, VideoReadError

# Frames decoded before they are resized; all frames of a long high-definition video would take gibibytes.
_FRAMES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class RowViews:
    """All views of one row of a list, or the reason why it cannot be read.

    Attributes:
        index: Row of the list.
        label: Class of the row.
        clips_VCTHW: uint8; None when the video cannot be read.
        bad: Why it cannot be read; None when it can.
    """

    index: int
    label: int
    clips_VCTHW: Tensor | None
    bad: str | None = None

    @property
    def pixels(self) -> Tensor | None:
        """The clips, as the loader's `Sample` calls them."""
        return self.clips_VCTHW

    def with_pixels(self, pixels: Tensor | None) -> "RowViews":
        return replace(self, clips_VCTHW=pixels)


def dense_clips(num_frames: int, clip_length: int, stride: int, num_clips: int) -> list[list[int]]:
    """Return the frames of clips spread evenly over a video, each of every ``stride``-th frame.

    Strided frames are counted from frame 0 over the whole video; if there are fewer than ``clip_length``, the last
    one repeats. Clip k starts at strided frame ``int(k * step)``, and the last clip ends at the last strided frame.

    Source: official code, dense test mode. Differs from the official code: a single clip is taken from the middle.
    """
    require_frames(num_frames)
    strided = list(range(0, num_frames, stride))
    strided += [strided[-1]] * (clip_length - len(strided))
    starts = spread(len(strided) - clip_length, num_clips)
    return [strided[start : start + clip_length] for start in starts]


def timed_clips(times_s: NDArray[np.float64], clip_length: int, seconds: float, num_clips: int) -> list[list[int]]:
    """Return the frames of clips spread evenly over a video in time, each of frames shown ``seconds`` apart.

    The first clip starts with the video, the last one ends at the start of its last frame; a single clip is taken
    from the middle. ``times_s`` are the ascending start times of the frames; see
    `everest_ds.data.readers.timing.frames_at`.
    """
    room_s = clip_room_s(times_s, clip_length, seconds)
    shares = [k / (num_clips - 1) for k in range(num_clips)] if num_clips > 1 else [0.5]
    return [frames_at(times_s, clip_length, seconds, share * room_s) for share in shares]


def segment_clips(num_frames: int, clip_length: int, num_clips: int) -> list[list[int]]:
    """Return the frames of interleaved clips, each with one frame from each of ``clip_length`` equal parts.

    With parts of t frames, clip k of K takes frame ``int(t * i + t * k / K)`` of part i. A video with fewer frames
    than parts repeats some.

    Source: official code, segment test mode, which has K = 2. Differs from the official code: any K, and a single
    clip takes the middle of each part, ``int(t * i + t / 2)``.
    """
    require_frames(num_frames)
    part = num_frames / clip_length
    shares = [k * part / num_clips for k in range(num_clips)] if num_clips > 1 else [part / 2]
    return [[int(part * i + share) for i in range(clip_length)] for share in shares]


def spread(room: int, count: int) -> list[int]:
    """Return ``count`` positions spread evenly from 0 to ``room``, both included; a single one is in the middle.

    They are rounded down in floats, as in the official code: ``int(k * (room / (count - 1)))``.
    """
    if count == 1:
        return [room // 2]
    step = room / (count - 1)
    return [int(k * step) for k in range(count)]


def crop_origins(height: int, width: int, size: int, num_crops: int) -> list[tuple[int, int]]:
    """Return the corners (top, left) of ``size`` x ``size`` crops along the longer side of a resized frame."""
    starts = spread(max(height, width) - size, num_crops)
    return [(start, 0) if height > width else (0, start) for start in starts]


def resize_shorter_side(frames_TCHW: Tensor, size: int) -> Tensor:
    """Resize uint8 frames so that their shorter side has ``size`` pixels; the longer side is rounded down.

    Source: official code, ``int(size * longer / shorter)``: 320 x 240 gives 298 x 224 as in the golden cases.
    Differs from the official code: antialiased weights instead of OpenCV's bilinear ones.
    """
    height, width = frames_TCHW.shape[-2:]
    longer = size * max(height, width) // min(height, width)
    return resize_frames(frames_TCHW, *((size, longer) if height <= width else (longer, size)))


def view_frames(video: Video, data: FinetuneDataConfig, num_clips: int) -> list[list[int]]:
    """Return the frames of each clip over time, as numbers in the video or its window.

    Raises:
        VideoReadError: The times of the frames cannot be read.
    """
    if data.sampling_seconds is not None:
        return timed_clips(video.times_s(), data.num_frames, data.sampling_seconds, num_clips)
    if data.sampling == "segment":
        return segment_clips(video.num_frames, data.num_frames, num_clips)
    return dense_clips(video.num_frames, data.num_frames, data.sampling_stride, num_clips)


def read_views(video: Video, data: FinetuneDataConfig, views: ViewsConfig) -> Tensor:
    """Read all views of an open video, clips_VCTHW uint8; V = num_temporal * num_spatial, time first.

    Raises:
        VideoReadError: A frame cannot be decoded.
    """
    clips, size = view_frames(video, data, views.num_temporal), data.image_size
    frame_idx = sorted({frame for clip in clips for frame in clip})
    parts = [frame_idx[start : start + _FRAMES_AT_ONCE] for start in range(0, len(frame_idx), _FRAMES_AT_ONCE)]
    frames_FCHW = torch.cat([_read_resized(video, part, len(frame_idx), data) for part in parts])
    origins = crop_origins(frames_FCHW.shape[2], frames_FCHW.shape[3], size, views.num_spatial)
    clips_VTCHW = torch.stack(
        [
            frames_FCHW[np.searchsorted(frame_idx, clip), :, top : top + size, left : left + size]
            for clip in clips
            for top, left in origins
        ]
    )
    return rearrange(clips_VTCHW, "v t c h w -> v c t h w").contiguous()


def _read_resized(video: Video, part: Sequence[int], num_frames: int, data: FinetuneDataConfig) -> Tensor:
    """Read and resize some of the ``num_frames`` frames that the views need: frames_FCHW."""
    frames_FCHW = rearrange(torch.from_numpy(video.read(part)), "f h w c -> f c h w")
    height, width = frames_FCHW.shape[2:]
    longer = data.image_size * max(height, width) // min(height, width)
    if num_frames * data.image_size * longer > data.max_pixels:
        raise VideoReadError(
            video.path,
            f"{num_frames} frames of {width}x{height} pixels, resized to a shorter side of {data.image_size}, are "
            f"more than data.max_pixels={data.max_pixels}",
        )
    return resize_shorter_side(frames_FCHW, data.image_size)


class ViewDataset(SampleMaker[int, RowViews]):
    """Makes the views of a list's rows; the keys are row numbers.

    Raises:
        UserError: The reader of ``config`` is not available on this machine.
    """

    config: FinetuneDataConfig

    def __init__(self, rows: Sequence[VideoRow], config: FinetuneDataConfig, views: ViewsConfig) -> None:
        choose_reader(config.reader)
        self.rows = packed(rows)
        self.config = config
        self.views = views
        self.sample_bytes = views.num_temporal * views.num_spatial * 3 * config.num_frames * config.image_size**2

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> RowViews:
        """Return the views of a row; if it cannot be read, ``bad`` says why and nothing is raised."""
        return self([index], {}, lambda _: None)[0]

    def __call__(self, request: Sequence[int], unreadable: Mapping[int, str], mark: Mark) -> list[RowViews]:
        """Return the views of rows; see `everest_ds.data.loading.loader.SampleMaker`."""
        results = []
        for number, index in enumerate(request):
            row = self.rows[index]
            try:
                if number in unreadable:
                    raise VideoReadError(row.path, unreadable[number])
                mark(number)
                video = Video.of_row(row, self.config.reader, self.config.max_pixels)
                clips_VCTHW = read_views(video, self.config, self.views)
            except (VideoReadError, MemoryError, RuntimeError) as error:
                if not (isinstance(error, VideoReadError) or is_lack_of_memory(error)):
                    raise
                bad = error.reason if isinstance(error, VideoReadError) else NO_MEMORY
                results.append(RowViews(index=index, label=row.label, clips_VCTHW=None, bad=bad))
            else:
                results.append(RowViews(index=index, label=row.label, clips_VCTHW=clips_VCTHW))
        return results


def make_view_loader(
    dataset: ViewDataset, groups: Sequence[Sequence[int]], *, pin_memory: bool
) -> Loader[int, RowViews, list[RowViews]]:
    """Return a loader that yields the rows of each group, in order."""

    def copy(row: RowViews) -> RowViews:
        clips = row.clips_VCTHW
        return row.with_pixels(
            None if clips is None else torch.empty_like(clips, pin_memory=pin_memory).copy_(clips)
        )

    requests = [[[index] for index in group] for group in groups]
    batch_samples = max(map(len, groups), default=1)
    return Loader(dataset, requests, lambda rows: [copy(row) for row in rows], batch_samples=batch_samples)
