"""CPU time of a clip by phase, over all threads of one process, for several interleaved ways to make the clip.

Place in the flow: rows of a list -> ways (ours with a reader, or the official one) -> rounds -> `Costs`. Every
round makes the same clips from the same frames and crops, so only the machine's speed differs between rounds.
Axes: B clips, T frames, H W pixels, C colour channels.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from everest_ds.data.clips.batch import Clip, ClipBatch, mix_pairs
from everest_ds.data.clips.cuts import PretrainCut
from everest_ds.data.clips.dataset import ClipDataset
from everest_ds.data.clips.sampling import RandomStream, SampleKey, sample_draws
from everest_ds.data.clips.transforms import draw_crop
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.base import first_line
from everest_ds.data.readers.video import Video, VideoReadError
from everest_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD

Phase = Literal["open", "decode", "augment", "collate", "copy"]
PHASES: tuple[Phase, ...] = ("open", "decode", "augment", "collate", "copy")
# Phases of a single clip, without its batch; and phases that run in a loader worker.
CLIP_PHASES, WORKER_PHASES = PHASES[:3], PHASES[:4]
# Ways alternate after a second or less of work, so that a change of the machine's speed affects all of them.
_VIDEOS_A_TURN = 4


class PhaseTimer:
    """Sums the seconds of each phase in `spent_s`; phases that did not run are missing.

    The clock is the CPU time of all threads of this process, because decoders have threads of their own. The load
    of other processes does not count.
    """

    def __init__(self, now: Callable[[], float] = time.process_time) -> None:
        self._now = now
        self.spent_s: dict[Phase, float] = {}

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        began = self._now()
        yield
        self.spent_s[phase] = self.spent_s.get(phase, 0.0) + self._now() - began


@dataclass(frozen=True)
class OurWay:
    """Makes clips phase by phase as a worker of a training run does, and copies batches to the device, if any."""

    dataset: ClipDataset
    repeats: int = 1
    """Number of clips from one decoded video."""
    device: torch.device | None = None

    @property
    def name(self) -> str:
        return self.dataset.config.reader

    def make_batch(self, rows: Sequence[int], timer: PhaseTimer) -> Tensor:
        """Make the clips of these rows as one batch, and time each phase.

        Returns:
            clips_BCTHW, uint8, with ``repeats`` clips of every row.

        Raises:
            VideoReadError: A video cannot be read.
        """
        clips = [clip for row in rows for clip in self._clips(row, timer)]
        with timer.phase("collate"):
            mixer = self.dataset.mixer
            lone = clips[-1:] if mixer and len(clips) % 2 else []  # without a partner: mixed with itself
            mixed = mix_pairs([*clips, *lone], mixer)[: len(clips)] if mixer else clips
            batch = ClipBatch.collate(mixed, crops=self.dataset.cut.delivers_crops, pin=self.device is not None)
        return time_copy(partial(batch.clips_on, image_size=self.dataset.config.image_size), self.device, timer)

    def _clips(self, index: int, timer: PhaseTimer) -> Iterator[Clip]:
        with timer.phase("open"):
            video = Video.of_row(self.dataset.rows[index], self.dataset.config.reader)
        with timer.phase("decode"):
            draws = sample_draws(self.dataset.seed, SampleKey(0, index))
            frame_idx = self.dataset.cut.choose_frames(video, draws)
            frames_THWC = video.read(frame_idx)
            del video  # closing is part of the cost
        for repeat in range(self.repeats):
            with timer.phase("augment"):
                clip = self.dataset.make_clip(SampleKey(0, index, repeat), frame_idx, frames_THWC)
            yield clip


@dataclass(frozen=True)
class OfficialWay:
    """Makes a pre-training clip as the official loaders do; written from their description.

    decord decodes with one thread. Each frame becomes a PIL image and is cropped and resized. The stack of images
    becomes a normalised float tensor. Frames and crops are the same as in our clip. Rows must not have windows.
    """

    rows: Sequence[VideoRow]
    cut: PretrainCut
    seed: int
    device: torch.device | None = None
    name: str = "official"
    repeats: int = 1

    def make_batch(self, rows: Sequence[int], timer: PhaseTimer) -> Tensor:
        """Make float32 clips; see `OurWay.make_batch`."""
        clips = [self._clip(row, timer) for row in rows]
        with timer.phase("collate"):
            clips_BCTHW = torch.stack(clips)
            if self.device is not None:
                clips_BCTHW = clips_BCTHW.pin_memory()
        return time_copy(partial(clips_BCTHW.to, non_blocking=True), self.device, timer)

    def _clip(self, index: int, timer: PhaseTimer) -> Tensor:
        import decord

        path, draws = self.rows[index].path, sample_draws(self.seed, SampleKey(0, index))
        try:
            with timer.phase("open"):
                reader: Any = decord.VideoReader(str(path.absolute()), num_threads=1)
            with timer.phase("decode"):
                frame_idx = self.cut.frames_by_number(len(reader), draws(RandomStream.FRAMES))
                frames_THWC: NDArray[np.uint8] = reader.get_batch(frame_idx).asnumpy()
                del reader  # closing is part of the cost
        except (OSError, RuntimeError, ValueError, decord.DECORDError) as error:
            raise VideoReadError(path, first_line(error)) from error
        with timer.phase("augment"):
            config, (height, width) = self.cut.config, frames_THWC.shape[1:3]
            crop = draw_crop(width, height, config.image_size, config.crop_scales, draws(RandomStream.CROP))
            return official_clip(frames_THWC, crop, config.image_size)


Way = OurWay | OfficialWay


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


def time_copy(move: Callable[[torch.device], Tensor], device: torch.device | None, timer: PhaseTimer) -> Tensor:
    """Move a batch to a GPU, including a resize on the device, and time this; without a GPU nothing is timed."""
    if device is None:
        return move(torch.device("cpu"))
    with timer.phase("copy"):
        clips_BCTHW = move(device)
        torch.cuda.synchronize(device)
    return clips_BCTHW


@dataclass
class Costs:
    """Costs of a clip made in one way: CPU milliseconds a clip by phase, one dictionary a round."""

    rounds: list[dict[Phase, float]] = field(default_factory=list)

    def phase_ms(self, phase: Phase) -> float | None:
        """Return the median of a phase over the rounds; None if it did not run."""
        values = [spent[phase] for spent in self.rounds if phase in spent]
        return statistics.median(values) if values else None

    def sums_ms(self, phases: Sequence[Phase] = CLIP_PHASES) -> list[float]:
        """Return the sum of these phases for each round."""
        return [sum(spent.get(phase, 0.0) for phase in phases) for spent in self.rounds]

    @property
    def clip_ms(self) -> float:
        return statistics.median(self.sums_ms())

    @property
    def clip_p90_ms(self) -> float:
        return float(np.percentile(self.sums_ms(), 90))

    @property
    def clips_per_s_core(self) -> float:
        """Collated clips that one core makes in a second."""
        return 1e3 / statistics.median(self.sums_ms(WORKER_PHASES))

    def ratio_to(self, other: "Costs") -> float:
        """Return this cost divided by the other's, as the median over rounds; `CLIP_PHASES` of both."""
        pairs = zip(self.sums_ms(), other.sums_ms(), strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def measure_round(
    ways: Sequence[Way], rows: Sequence[int], *, first: int = 0, now: Callable[[], float] = time.process_time
) -> list[dict[Phase, float]]:
    """Make the clips of all rows in every way; the ways alternate after a few rows.

    Way number ``first`` (modulo the number of ways) begins. It should differ between rounds, so that no way is
    always the first to read a file. Returns CPU milliseconds a clip by phase, for each way.
    """
    pairs = [(way, PhaseTimer(now)) for way in ways]
    first %= len(ways)
    for start in range(0, len(rows), _VIDEOS_A_TURN):
        for way, timer in (*pairs[first:], *pairs[:first]):
            way.make_batch(rows[start : start + _VIDEOS_A_TURN], timer)
    return [
        {phase: 1e3 * spent / (len(rows) * way.repeats) for phase, spent in timer.spent_s.items()}
        for way, timer in pairs
    ]


class LeftOut(NamedTuple):
    """A video that is not measured, with the first way that cannot read it and the reason."""

    path: Path
    way: str
    reason: str


def warm_up(ways: Sequence[Way], num_rows: int) -> tuple[list[int], list[LeftOut]]:
    """Make every clip once in every way, to warm caches; return the rows that all ways can read, and the others."""
    rows, left_out = [], []
    for row in range(num_rows):
        try:
            for way in ways:
                way.make_batch([row], PhaseTimer())
        except VideoReadError as error:
            left_out.append(LeftOut(error.path, way.name, error.reason))
        else:
            rows.append(row)
    return rows, left_out


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside this block, as in a loader worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
