"""Training clips by key, made in the loader's workers.

Place in the flow: SampleKey -> video opened once -> frames of all its clips read once -> clip_CTHW uint8 (cuts.py)
and the task's noise -> Clip, mixed with its neighbour if clips are mixed. An unreadable video is replaced by
another one, drawn by key; the clip reports it, so nothing is dropped silently.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from everest_ds.data.clips.augment import PairMixer
from everest_ds.data.clips.batch import MAX_REPLACEMENTS, BadSample, Clip, ClipBatch, mix_pairs
from everest_ds.data.clips.cuts import Cut, UnfitFramesError
from everest_ds.data.clips.sampling import RandomStream, SampleKey, keyed_generator, sample_draws
from everest_ds.data.lists.video_list import VideoRow, packed
from everest_ds.data.loading.loader import Loader, SampleMaker
from everest_ds.data.loading.pool import Mark
from everest_ds.data.readers.base import is_lack_of_memory
from everest_ds.data.readers.choice import choose_reader
from everest_ds.data.readers.video import DecodedVideo, Video, VideoReadError


class ClipDataset(SampleMaker[SampleKey, Clip]):
    """Makes training clips by key.

    Args:
        rows: The list of videos.
        cut: Turns frames into a clip.
        seed: Seed of every draw.
        noise_length: Number of noise values of each clip.
        mixer: Mixes the clips of a micro-batch in pairs; None mixes nothing.

    Raises:
        UserError: The reader of ``cut.config`` is not available on this machine.
    """

    def __init__(
        self, rows: Sequence[VideoRow], cut: Cut, *, seed: int, noise_length: int, mixer: PairMixer | None = None
    ) -> None:
        choose_reader(cut.config.reader)
        self.rows = packed(rows)
        self.cut = cut
        self.config = cut.config
        self.sample_bytes = cut.max_bytes
        self.seed = seed
        self.noise_length = noise_length
        self.mixer = mixer
        self._decoded: dict[int, DecodedVideo] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """Leave decoded frames out of the copy for a worker."""
        return self.__dict__ | {"_decoded": {}}

    def __getitem__(self, key: SampleKey) -> Clip:
        """Return the unmixed clip of a key."""
        return self._read([key], {}, lambda _: None)[0]

    def requests(self, keys: Sequence[SampleKey]) -> list[list[SampleKey]]:
        """Divide a micro-batch, in order, into requests: all clips of a video, and both clips of a mixed pair, are
        in one request.
        """
        last = {(key.epoch, key.index): position for position, key in enumerate(keys)}
        requests: list[list[SampleKey]] = []
        start = furthest = 0
        for position, key in enumerate(keys):
            furthest = max(furthest, last[key.epoch, key.index])
            if position == furthest and not (self.mixer and position % 2 == 0):
                requests.append(list(keys[start : position + 1]))
                start = position + 1
        return requests + ([list(keys[start:])] if start < len(keys) else [])

    def __call__(self, request: Sequence[SampleKey], unreadable: Mapping[int, str], mark: Mark) -> list[Clip]:
        """Make the clips of a request; see `everest_ds.data.loading.loader.SampleMaker`.

        Unreadable videos are replaced, at most `MAX_REPLACEMENTS` times each. Nothing is raised for them: the batch
        reports them, see `ClipBatch.require_whole`.
        """
        clips = self._read(request, unreadable, mark)
        return mix_pairs(clips, self.mixer) if self.mixer else clips

    def _read(self, request: Sequence[SampleKey], unreadable: Mapping[int, str], mark: Mark) -> list[Clip]:
        videos: dict[tuple[int, int], list[SampleKey]] = {}
        for key in request:
            videos.setdefault((key.epoch, key.index), []).append(key)
        opened = itertools.count()
        clips: dict[SampleKey, Clip] = {}
        for keys in videos.values():
            clips |= zip(keys, self._read_video(keys, opened, unreadable, mark), strict=True)
        return [clips[key] for key in request]

    def _read_video(
        self, keys: Sequence[SampleKey], opened: Iterator[int], unreadable: Mapping[int, str], mark: Mark
    ) -> list[Clip]:
        """Return the clips of one video; if it cannot be read, all of them are cut from one replacement."""
        epoch, index = keys[0].epoch, keys[0].index
        replacements = keyed_generator(self.seed, RandomStream.REPLACEMENT, epoch, index)
        failed: list[tuple[int, VideoReadError]] = []
        clips = [Clip.lost(key) for key in keys]
        while not clips[0].was_read and len(failed) <= MAX_REPLACEMENTS:
            number = next(opened)
            try:
                if number in unreadable:
                    raise VideoReadError(self.rows[index].path, unreadable[number])
                mark(number)
                clips = self._cut_clips([replace(key, index=index) for key in keys])
            except (VideoReadError, MemoryError, RuntimeError) as error:
                failed.append((index, _as_bad(self.rows[index].path, error)))
                index = int(replacements.integers(len(self.rows)))
        return [
            replace(
                clip,
                key=key,
                bad=tuple(BadSample(str(e.path), e.reason, epoch, row, key.repeat) for row, e in failed),
            )
            for clip, key in zip(clips, keys, strict=True)
        ]

    def _cut_clips(self, keys: Sequence[SampleKey]) -> list[Clip]:
        """Read the frames of all clips of a video once, and cut the clips."""
        video = self._open(keys[0].index)
        # The clips of a video share their frames unless each draws its own.
        share = self.config.repeat_frames == "shared"
        drawn_for = [replace(key, repeat=0) if share else key for key in keys]
        frame_idx = [self.cut.choose_frames(video, sample_draws(self.seed, key)) for key in drawn_for]
        present = sorted({frame for idx in frame_idx for frame in idx})
        frames_THWC = video.read(present)
        return [
            self.make_clip(key, idx, _pick(frames_THWC, present, idx))
            for key, idx in zip(keys, frame_idx, strict=True)
        ]

    def make_clip(self, key: SampleKey, frame_idx: Sequence[int], frames_THWC: NDArray[np.uint8]) -> Clip:
        """Cut the clip of a key from its frames.

        Raises:
            VideoReadError: The frames cannot be cropped.
        """
        row, draws = self.rows[key.index], sample_draws(self.seed, key)
        try:
            pixels = self.cut.clip(frames_THWC, draws)
        except UnfitFramesError as error:
            raise VideoReadError(row.path, str(error)) from error
        noise_S = draws(RandomStream.NOISE).random(self.noise_length, dtype=np.float32)
        return Clip(pixels, np.array(frame_idx), noise_S, label=row.label, index=key.index, key=key)

    def _open(self, index: int) -> Video:
        """Open the video of a row, or return its decoded frames if they are kept in memory."""
        if index in self._decoded:
            return self._decoded[index]
        video = Video.of_row(self.rows[index], self.config.reader, self.config.max_pixels)
        if not self.config.keep_decoded:
            return video
        self._decoded[index] = DecodedVideo(video, with_times=self.config.sampling_seconds is not None)
        return self._decoded[index]


def _as_bad(path: Path, error: Exception) -> VideoReadError:
    """Return a fault of the video, or lack of memory, as a VideoReadError; raise all other errors."""
    if isinstance(error, VideoReadError):
        return error
    if is_lack_of_memory(error):
        return VideoReadError(path, "there is not enough memory to make a clip of it")
    raise error


def make_loader(
    dataset: ClipDataset, sampler: Sampler[list[SampleKey]], *, micro_size: int, pin_memory: bool
) -> Loader[SampleKey, Clip, ClipBatch]:
    """Return the loader of a rank's micro-batches, of ``micro_size`` clips each."""
    return Loader(
        dataset,
        map(dataset.requests, sampler),
        partial(ClipBatch.collate, crops=dataset.cut.delivers_crops, pin=pin_memory),
        micro_size,
        request_samples=min(dataset.config.repeats * (2 if dataset.mixer else 1), micro_size),
    )


def _pick(frames_THWC: NDArray[np.uint8], present: Sequence[int], wanted: Sequence[int]) -> NDArray[np.uint8]:
    """Return the ``wanted`` frames; ``present`` are the numbers of ``frames_THWC``. Copies only if they differ."""
    if list(present) == list(wanted):
        return frames_THWC
    return frames_THWC[np.searchsorted(present, wanted)]
