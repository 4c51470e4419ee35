"""Training clips by key: what the loader's processes do.

Place in the flow: SampleKey -> video opened once -> frames of all its clips read once -> clip_CTHW uint8 (cuts.py),
the task's noise -> Clip, mixed with its neighbour where clips are mixed. An unreadable video is replaced by another
one, drawn by key, and reported with the clip; it is never dropped silently.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from everest_ds.config.sections import DataConfig
from everest_ds.data.clips.augment import PairMixer
from everest_ds.data.clips.batch import MAX_REPLACEMENTS, BadSample, Clip, ClipBatch, mix_pairs
from everest_ds.data.clips.cuts import Cut, UnfitFramesError, choose_frames
from everest_ds.data.clips.sampling import RandomStream, SampleKey, keyed_generator
from everest_ds.data.lists.video_list import PackedRows, VideoRow
from everest_ds.data.loading.loader import Loader
from everest_ds.data.loading.pool import Mark
from everest_ds.data.readers.choice import choose_reader
from everest_ds.data.readers.video import DecodedVideo, Video, VideoReadError

Unit = tuple[SampleKey, ...]
"""Clips that are made together: those of a video, and where clips are mixed, those of all videos that mix."""


class ClipDataset:
    """Makes training clips by key.

    Args:
        rows: The list of videos.
        cut: Turns frames into a clip.
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

    @property
    def sample_bytes(self) -> int:
        """Bytes of a clip, or of a crop at most."""
        return self.cut.most_bytes

    def __len__(self) -> int:
        """Return the number of videos."""
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """Go to another process with packed rows, and without decoded frames."""
        return self.__dict__ | {"rows": PackedRows(self.rows), "_decoded": {}}

    def __getitem__(self, key: SampleKey) -> Clip:
        """Return the clip of a key, not mixed."""
        return self._read((key,), {}, lambda _: None)[0]

    def units(self, keys: Sequence[SampleKey]) -> list[Unit]:
        """Divide a micro-batch into what is made together, in its order."""
        last = {(key.epoch, key.index): place for place, key in enumerate(keys)}
        units: list[Unit] = []
        start = furthest = 0
        for place, key in enumerate(keys):
            furthest = max(furthest, last[key.epoch, key.index])
            if place == furthest and not (self.mixer and place % 2 == 0):
                units.append(tuple(keys[start : place + 1]))
                start = place + 1
        return units + ([tuple(keys[start:])] if start < len(keys) else [])

    def __call__(self, request: Sequence[SampleKey], unreadable: Mapping[int, str], mark: Mark) -> list[Clip]:
        """Make the clips of a unit; unreadable videos are replaced, at most `MAX_REPLACEMENTS` times each.

        Nothing is raised for bad videos: the batch says what was bad, see `ClipBatch.require_whole`.

        Args:
            request: The unit.
            unreadable: Videos that are known to be bad, by their number in the order of opening, and why.
            mark: Told the number of each video before it is opened.
        """
        clips = self._read(request, unreadable, mark)
        return mix_pairs(clips, self.mixer) if self.mixer else clips

    def _read(self, unit: Sequence[SampleKey], faults: Mapping[int, str], mark: Mark) -> list[Clip]:
        numbers = itertools.count()
        clips: dict[SampleKey, Clip] = {}
        for epoch, index in dict.fromkeys((key.epoch, key.index) for key in unit):
            keys = [key for key in unit if (key.epoch, key.index) == (epoch, index)]
            clips |= zip(keys, self._clips_of(keys, numbers, faults, mark), strict=True)
        return [clips[key] for key in unit]

    def _clips_of(
        self, keys: Sequence[SampleKey], numbers: Iterator[int], faults: Mapping[int, str], mark: Mark
    ) -> list[Clip]:
        """Return the clips of one video, or of its replacement, which all of them share."""
        epoch, index = keys[0].epoch, keys[0].index
        replacements = keyed_generator(self.seed, RandomStream.REPLACEMENT, epoch, index)
        failed: list[tuple[int, VideoReadError]] = []
        clips: Sequence[Clip] = ()
        while not clips and len(failed) <= MAX_REPLACEMENTS:
            number = next(numbers)
            try:
                if number in faults:
                    raise VideoReadError(self.rows[index].path, faults[number])
                mark(number)
                clips = self._cut([replace(key, index=index) for key in keys])
            except VideoReadError as error:
                failed.append((index, error))
                index = int(replacements.integers(len(self.rows)))
        if not clips:
            lost = Clip(pixels=None, frames_T=None, noise_S=None, label=-1, index=keys[0].index, key=keys[0])
            clips = [lost] * len(keys)
        return [
            replace(
                clip,
                key=key,
                bad=tuple(BadSample(str(e.path), e.reason, epoch, row, key.repeat) for row, e in failed),
            )
            for clip, key in zip(clips, keys, strict=True)
        ]

    def _cut(self, keys: Sequence[SampleKey]) -> list[Clip]:
        """Read the frames of all clips of a video once, and cut the clips."""
        row = self.rows[keys[0].index]
        video = self._open(keys[0].index)
        frame_idx = [self._frame_idx(video, key) for key in keys]
        wanted = sorted({frame for idx in frame_idx for frame in idx})
        frames_THWC = video.read(wanted)
        clips = []
        for key, idx in zip(keys, frame_idx, strict=True):
            draws = partial(self._draws, key)
            own_THWC = _choose(frames_THWC, wanted, idx)
            try:
                pixels = self.cut.clip(own_THWC, draws)
            except UnfitFramesError as error:
                raise VideoReadError(row.path, str(error)) from error
            noise = draws(RandomStream.NOISE).random(self.noise_length, dtype=np.float32)
            clips.append(
                Clip(
                    pixels=pixels,
                    frames_T=np.array(idx),
                    noise_S=noise,
                    label=row.label,
                    index=key.index,
                    key=key,
                )
            )
        return clips

    def _frame_idx(self, video: Video, key: SampleKey) -> list[int]:
        """Draw the frames of a clip; the clips of a video share them unless they are to have their own."""
        drawn_for = key if self.config.repeat_frames == "own" else replace(key, repeat=0)
        return choose_frames(self.cut, video, partial(self._draws, drawn_for))

    def _open(self, index: int) -> Video:
        """Open the video of a row, or take it from memory where decoded frames are kept."""
        if index in self._decoded:
            return self._decoded[index]
        video = Video.of_row(self.rows[index], self.config.reader)
        if not self.config.keep_decoded:
            return video
        self._decoded[index] = DecodedVideo(video, with_times=self.config.sampling_seconds is not None)
        return self._decoded[index]

    def _draws(self, key: SampleKey, stream: RandomStream) -> np.random.Generator:
        return keyed_generator(self.seed, stream, key.epoch, key.index, key.repeat)


def make_loader(
    dataset: ClipDataset,
    sampler: Sampler[list[SampleKey]],
    *,
    micro_size: int,
    pin_memory: bool,
) -> Loader[SampleKey, Clip, ClipBatch]:
    """Return the loader of a process's micro-batches, of ``micro_size`` clips each."""
    return Loader(
        dataset,
        (dataset.units(keys) for keys in sampler),
        partial(ClipBatch.collate, crops=dataset.cut.delivers_crops, pin=pin_memory),
        batch_samples=micro_size,
        request_samples=min(dataset.config.repeats * (2 if dataset.mixer else 1), micro_size),
    )


def _choose(frames_THWC: NDArray[np.uint8], present: Sequence[int], wanted: Sequence[int]) -> NDArray[np.uint8]:
    """Return the frames wanted of those present; copies only where it must."""
    if list(present) == list(wanted):
        return frames_THWC
    place = {frame: i for i, frame in enumerate(present)}
    return frames_THWC[[place[frame] for frame in wanted]]
