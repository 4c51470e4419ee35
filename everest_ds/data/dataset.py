"""Clips for training: a map from sample keys to clips, and the loader around it.

Place in the flow: SampleKey -> video -> frames -> clip_CTHW uint8 and selection noise -> ClipBatch. An
unreadable video is replaced by another sample, drawn by key, and reported with the batch; it is never dropped
silently.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from everest_ds.config import PretrainDataConfig
from everest_ds.data.index import VideoRow
from everest_ds.data.sampling import SampleKey, Stream, keyed_generator, stride_indices
from everest_ds.data.transforms import draw_crop, make_clip
from everest_ds.data.video import Video, VideoReadError
from everest_ds.errors import UserError

MAX_REPLACEMENTS = 10


@dataclass(frozen=True)
class BadSample:
    """A draw that could not be read."""

    path: str
    reason: str
    epoch: int
    index: int


@dataclass(frozen=True)
class Clip:
    """One training sample, or nothing but the draws that failed when too many in a row did.

    Attributes:
        clip_CTHW: uint8; None when no replacement could be read.
        noise_S: float32 in [0, 1), the selection noise.
        label: Class of the list's row.
        index: Row of the list.
        bad: Draws that could not be read before this one.
    """

    clip_CTHW: Tensor | None
    noise_S: Tensor | None
    label: int
    index: int
    bad: tuple[BadSample, ...] = ()


@dataclass
class ClipBatch:
    """One micro-batch.

    Attributes:
        clips_BCTHW: uint8.
        noise_BS: float32 in [0, 1), the selection noise of each clip.
        label_B: int64.
        index_B: int64, rows of the list.
        bad: Draws that could not be read while this batch was made.
        num_lost: Samples that are missing because no replacement could be read either.
    """

    clips_BCTHW: Tensor
    noise_BS: Tensor
    label_B: Tensor
    index_B: Tensor
    bad: list[BadSample] = field(default_factory=list)
    num_lost: int = 0

    @classmethod
    def collate(cls, clips: Sequence[Clip]) -> "ClipBatch":
        """Stack samples into a batch; samples that no replacement was found for are left out."""
        pixels = [clip.clip_CTHW for clip in clips if clip.clip_CTHW is not None]
        noise = [clip.noise_S for clip in clips if clip.noise_S is not None]
        read = [clip for clip in clips if clip.clip_CTHW is not None]
        return cls(
            clips_BCTHW=torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8),
            noise_BS=torch.stack(noise) if noise else torch.empty(0),
            label_B=torch.tensor([clip.label for clip in read]),
            index_B=torch.tensor([clip.index for clip in read]),
            bad=[bad for clip in clips for bad in clip.bad],
            num_lost=len(clips) - len(read),
        )

    def require_whole(self) -> None:
        """Refuse a batch with a hole in it.

        Raises:
            UserError: As many draws one after another as `MAX_REPLACEMENTS` allows could not be read.
        """
        if self.num_lost:
            last = self.bad[-1]
            raise UserError(
                f"{MAX_REPLACEMENTS + 1} videos drawn one after another cannot be read, the last is {last.path}: "
                f"{last.reason}; check the list and the storage it points to"
            )

    def pin_memory(self) -> "ClipBatch":
        """Move the tensors to pinned memory (called by the loader)."""
        self.clips_BCTHW = self.clips_BCTHW.pin_memory()
        self.noise_BS = self.noise_BS.pin_memory()
        return self


class ClipDataset(Dataset[Clip]):
    """Training clips by key.

    Args:
        rows: The list of videos.
        config: How a clip is cut.
        seed: Seed of every draw.
        noise_length: Selection noise values that come with each clip.
    """

    def __init__(
        self, rows: Sequence[VideoRow], config: PretrainDataConfig, *, seed: int, noise_length: int
    ) -> None:
        self.rows = rows
        self.config = config
        self.seed = seed
        self.noise_length = noise_length

    def __len__(self) -> int:
        """Return the number of videos."""
        return len(self.rows)

    def __getitem__(self, key: SampleKey) -> Clip:
        """Read the clip of a key; an unreadable one is replaced, at most `MAX_REPLACEMENTS` times.

        Nothing is raised for bad videos: an exception in a loader process would arrive with its traceback as its
        message. The batch says what was bad, see `ClipBatch.require_whole`.
        """
        bad: list[BadSample] = []
        index = key.index
        replacements = keyed_generator(self.seed, Stream.REPLACEMENT, key.epoch, key.index, key.repeat)
        while len(bad) <= MAX_REPLACEMENTS:
            try:
                return self._read(SampleKey(key.epoch, index, key.repeat), tuple(bad))
            except VideoReadError as error:
                bad.append(BadSample(str(error.path), error.reason, key.epoch, index))
            index = int(replacements.integers(len(self.rows)))
        return Clip(clip_CTHW=None, noise_S=None, label=-1, index=key.index, bad=tuple(bad))

    def _read(self, key: SampleKey, bad: tuple[BadSample, ...]) -> Clip:
        row = self.rows[key.index]
        video = Video(row.path)
        frame_idx = stride_indices(
            video.num_frames, self.config.num_frames, self.config.sampling_stride, self._draws(Stream.FRAMES, key)
        )
        frames_THWC = video.read(frame_idx)
        height, width = frames_THWC.shape[1:3]
        size = self.config.image_size
        crop = draw_crop(width, height, size, self.config.crop_scales, self._draws(Stream.CROP, key))
        if min(crop[2:]) < 1:
            raise VideoReadError(row.path, f"its frames of {width}x{height} pixels are too small to crop")
        mirror = self.config.flip and self._draws(Stream.FLIP, key).random() < 0.5
        noise = self._draws(Stream.SELECTION, key).random(self.noise_length, dtype="float32")
        return Clip(
            clip_CTHW=make_clip(frames_THWC, crop, size, mirror=mirror),
            noise_S=torch.from_numpy(noise),
            label=row.label,
            index=key.index,
            bad=bad,
        )

    def _draws(self, stream: Stream, key: SampleKey) -> np.random.Generator:
        return keyed_generator(self.seed, stream, key.epoch, key.index, key.repeat)


def make_loader(
    dataset: ClipDataset,
    sampler: Sampler[list[SampleKey]],
    *,
    pin_memory: bool,
    worker_init: Callable[[int], None] | None = None,
) -> DataLoader[Clip]:
    """Return the loader of a process's micro-batches.

    Workers come from a fork server, never from a fork of a process that may hold a CUDA context. Each calls
    ``worker_init`` with its number as it begins.
    """
    workers = dataset.config.num_workers
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=ClipBatch.collate,
        num_workers=workers,
        prefetch_factor=dataset.config.prefetch_batches if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=worker_init,
        timeout=dataset.config.timeout_s if workers else 0,
    )
