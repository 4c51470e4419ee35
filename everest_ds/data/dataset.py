"""Clips for training: a map from sample keys to clips, and the loader around it.

Place in the flow: SampleKey -> video -> clip_CTHW uint8 and its frames (cuts.py), the task's noise -> ClipBatch. An
unreadable video is replaced by another sample, drawn by key, and reported with the batch; it is never dropped
silently. Axes: B clips, C T H W of a clip, S noise values, K classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from everest_ds.config.sections import DataConfig
from everest_ds.data.augment import PairMixer
from everest_ds.data.cuts import Cut
from everest_ds.data.index import VideoRow
from everest_ds.data.readers.choice import choose_reader
from everest_ds.data.sampling import SampleKey, Stream, keyed_generator
from everest_ds.data.video import DecodedVideo, Video, VideoReadError
from everest_ds.errors import UserError

T = TypeVar("T")

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
        frames_T: int64, the frame of the video that each frame of the clip is; None as above.
        noise_S: float32 in [0, 1), as many values as the task asked for.
        label: Class of the list's row.
        index: Row of the list.
        key: What was asked for; another row where that one could not be read.
        bad: Draws that could not be read before this one.
    """

    clip_CTHW: Tensor | None
    frames_T: Tensor | None
    noise_S: Tensor | None
    label: int
    index: int
    key: SampleKey
    bad: tuple[BadSample, ...] = ()


@dataclass
class ClipBatch:
    """One micro-batch.

    Attributes:
        clips_BCTHW: uint8.
        frames_BT: int64, the frame of its video that each frame of a clip is; for a mixed clip, of its own video.
        noise_BS: float32 in [0, 1), the values that the task asked for with each clip.
        label_B: int64.
        index_B: int64, rows of the list.
        target_BK: float32, the shares of the classes in each clip; None where no clips are mixed.
        bad: Draws that could not be read while this batch was made.
        num_lost: Samples that are missing because no replacement could be read either.
    """

    clips_BCTHW: Tensor
    frames_BT: Tensor
    noise_BS: Tensor
    label_B: Tensor
    index_B: Tensor
    target_BK: Tensor | None = None
    bad: list[BadSample] = field(default_factory=list)
    num_lost: int = 0

    @classmethod
    def collate(cls, clips: Sequence[Clip], mixer: PairMixer | None = None) -> "ClipBatch":
        """Stack samples into a batch; samples that no replacement was found for are left out.

        With a mixer the first is mixed with the second, the third with the fourth and so on; one that has lost its
        neighbour stays as it is.
        """
        noise = [clip.noise_S for clip in clips if clip.noise_S is not None]
        frames = [clip.frames_T for clip in clips if clip.frames_T is not None]
        read = [clip for clip in clips if clip.clip_CTHW is not None]
        pixels = [clip.clip_CTHW for clip in clips if clip.clip_CTHW is not None]
        targets: list[Tensor] = []
        if mixer:
            pixels, targets = _mix_pairs(clips, mixer)
        return cls(
            clips_BCTHW=torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8),
            frames_BT=torch.stack(frames) if frames else torch.empty(0, dtype=torch.int64),
            noise_BS=torch.stack(noise) if noise else torch.empty(0),
            label_B=torch.tensor([clip.label for clip in read]),
            index_B=torch.tensor([clip.index for clip in read]),
            target_BK=torch.stack(targets) if targets else None,
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
        self.frames_BT = self.frames_BT.pin_memory()
        self.noise_BS = self.noise_BS.pin_memory()
        self.label_B = self.label_B.pin_memory()
        if self.target_BK is not None:
            self.target_BK = self.target_BK.pin_memory()
        return self


class ClipDataset(Dataset[Clip]):
    """Training clips by key.

    Args:
        rows: The list of videos.
        cut: Turns an opened video into a clip.
        seed: Seed of every draw.
        noise_length: Noise values that come with each clip.
        mixer: Mixes the clips of a micro-batch in pairs.

    Raises:
        UserError: The reader of ``cut.config`` cannot serve on this machine.
    """

    def __init__(
        self,
        rows: Sequence[VideoRow],
        cut: Cut,
        *,
        seed: int,
        noise_length: int,
        mixer: PairMixer | None = None,
    ) -> None:
        choose_reader(cut.config.reader)
        self.rows = rows
        self.cut = cut
        self.seed = seed
        self.noise_length = noise_length
        self.mixer = mixer
        self._decoded: dict[int, DecodedVideo] = {}

    @property
    def config(self) -> DataConfig:
        """How clips are cut and loaded."""
        return self.cut.config

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
                return self._read(SampleKey(key.epoch, index, key.repeat), key, tuple(bad))
            except VideoReadError as error:
                bad.append(BadSample(str(error.path), error.reason, key.epoch, index))
            index = int(replacements.integers(len(self.rows)))
        return Clip(clip_CTHW=None, frames_T=None, noise_S=None, label=-1, index=key.index, key=key, bad=tuple(bad))

    def _read(self, key: SampleKey, asked: SampleKey, bad: tuple[BadSample, ...]) -> Clip:
        row = self.rows[key.index]
        draws = partial(self._draws, key)
        clip_CTHW, frame_idx = self.cut(self._open(key.index), draws)
        noise = draws(Stream.NOISE).random(self.noise_length, dtype="float32")
        return Clip(
            clip_CTHW=clip_CTHW,
            frames_T=torch.tensor(frame_idx),
            noise_S=torch.from_numpy(noise),
            label=row.label,
            index=key.index,
            key=asked,
            bad=bad,
        )

    def _open(self, index: int) -> Video:
        """Open the video of a row, or take it from memory where decoded frames are kept."""
        if index in self._decoded:
            return self._decoded[index]
        video = Video.of_row(self.rows[index], self.config.reader)
        if not self.config.keep_decoded:
            return video
        self._decoded[index] = DecodedVideo(video)
        return self._decoded[index]

    def _draws(self, key: SampleKey, stream: Stream) -> np.random.Generator:
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
        collate_fn=partial(ClipBatch.collate, mixer=dataset.mixer),
        num_workers=workers,
        prefetch_factor=dataset.config.prefetch_batches if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=worker_init,
        timeout=dataset.config.timeout_s if workers else 0,
    )


def next_batch(batches: Iterator[T], timeout_s: float) -> T:
    """Return the next batch of a loader.

    Raises:
        UserError: A loader process does not answer within ``timeout_s`` seconds, data.timeout_s.
        StopIteration: There is none left.
    """
    try:
        return next(batches)
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        raise UserError(
            f"no batch from the loader for data.timeout_s={timeout_s}: a video may hang its decoder, or the "
            "storage does not answer"
        ) from error


def each_batch(batches: Iterable[T], timeout_s: float) -> Iterator[T]:
    """Yield the batches of a loader; see `next_batch`."""
    iterator = iter(batches)
    while True:
        try:
            batch = next_batch(iterator, timeout_s)
        except StopIteration:
            return
        yield batch


def _mix_pairs(clips: Sequence[Clip], mixer: PairMixer) -> tuple[list[Tensor], list[Tensor]]:
    """Return the clips and their targets, those that were lost left out."""
    if len(clips) % 2:
        raise ValueError(f"{len(clips)} clips do not make pairs to mix; batch.micro_size must be even")
    pixels: list[Tensor] = []
    targets: list[Tensor] = []
    for first, second in zip(clips[::2], clips[1::2], strict=True):
        if first.clip_CTHW is not None and second.clip_CTHW is not None:
            labels = (first.label, second.label)
            clips_BCTHW, target_BK = mixer.mix(first.clip_CTHW, second.clip_CTHW, labels, first.key)
            pixels += clips_BCTHW.unbind()
            targets += target_BK.unbind()
            continue
        for clip in (first, second):
            if clip.clip_CTHW is not None:
                pixels.append(clip.clip_CTHW)
                targets.append(mixer.target(clip.label))
    return pixels, targets
