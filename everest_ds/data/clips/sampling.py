"""The samples of a step, the frames of a clip, and the random generators of all draws.

Place in the flow: (seed, epoch, sample index, repeat) -> random generator -> frame numbers. Nothing here depends on
the state of a worker or a rank, so any number of processes makes the same global batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from torch.utils.data import Sampler


class RandomStream(IntEnum):
    """Purpose of a draw. Each has its own random stream, so that an added draw does not shift those of the others.

    ORDER is keyed by the epoch, MIX by the first clip of a pair, the others by the sample. NOISE is for the task.
    """

    ORDER = 0
    FRAMES = 1
    CROP = 2
    FLIP = 3
    NOISE = 4
    REPLACEMENT = 5
    AUGMENT = 6
    ERASE = 7
    MIX = 8


@dataclass(frozen=True)
class SampleKey:
    """Identifies one clip of a run: sample index, epoch and repeat."""

    epoch: int
    index: int
    repeat: int = 0


Draws = Callable[[RandomStream], np.random.Generator]
"""Returns a sample's generator for a purpose."""


def keyed_generator(
    seed: int, stream: RandomStream, epoch: int, index: int = 0, repeat: int = 0
) -> np.random.Generator:
    """Return the generator of a sample and a purpose.

    Philox is counter-based: key and counter fix the position in its sequence, so the draws of different samples are
    independent and never overlap.
    """
    key = np.array([seed, int(stream)], dtype=np.uint64)
    counter = np.array([0, repeat, index, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def sample_draws(seed: int, key: SampleKey) -> Draws:
    """Return a function from a purpose to the sample's generator."""
    return lambda stream: keyed_generator(seed, stream, key.epoch, key.index, key.repeat)


def require_frames(num_frames: int) -> None:
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1")


def strided_frames(num_frames: int, clip_length: int, stride: int, generator: np.random.Generator) -> list[int]:
    """Return the frames of one clip: every ``stride``-th from a random start.

    A video shorter than ``clip_length * stride`` frames starts at 0 and repeats the last frame that the stride
    reaches.

    Source: official code, the pre-training loader's indices (golden frame_sampling.json, pretrain_train).
    """
    require_frames(num_frames)
    num_starts = num_frames - clip_length * stride + 1
    start = int(generator.integers(num_starts)) if num_starts > 0 else 0
    # The official loop advances only while at least one more frame follows the one it would reach.
    last_reachable = max(num_frames - 2 - start, 0) // stride
    return [start + min(step, last_reachable) * stride for step in range(clip_length)]


def dense_frames(num_frames: int, clip_length: int, stride: int, generator: np.random.Generator) -> list[int]:
    """Return the frames of one fine-tuning clip: spread over ``clip_length * stride`` frames at a random position.

    They include both ends of that range, so they are a little more than ``stride`` apart (4.27 for 16 frames at
    stride 4). The last frame of the video is never reached. A video not longer than the range gives one frame for
    each whole stride, spread over all of it, and then repeats its last frame.

    Source: official code, the fine-tuning loader's training indices (golden frame_sampling.json,
    finetune_dense_train_and_val).
    """
    require_frames(num_frames)
    length = clip_length * stride
    if num_frames > length:
        end = int(generator.integers(length, num_frames))
        start, num_spread = end - length, clip_length
    else:
        end = num_frames
        start, num_spread = 0, num_frames // stride
    spread = np.linspace(start, end, num=num_spread).astype(int).tolist()
    padding = [end] * (clip_length - num_spread)
    return [min(frame, end - 1) for frame in spread + padding]


def segment_frames(num_frames: int, num_segments: int, generator: np.random.Generator) -> list[int]:
    """Return one random frame from each of ``num_segments`` equal parts; remaining frames at the end are not used.

    A video with fewer frames than segments repeats its first frame.

    Source: official code, the training indices of Something-Something (golden frame_sampling.json, ssv2_segment).
    """
    require_frames(num_frames)
    length = num_frames // num_segments
    if length == 0:
        return [0] * num_segments
    offsets = generator.integers(length, size=num_segments)
    return [segment * length + int(offset) for segment, offset in enumerate(offsets)]


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of all samples in an epoch."""
    return keyed_generator(seed, RandomStream.ORDER, epoch).permutation(num_samples)


@dataclass(kw_only=True, eq=False)
class GlobalBatchSampler(Sampler[list[SampleKey]]):
    """Yields this rank's micro-batches of the run, epoch after epoch, starting at any step.

    Micro-step a of rank r takes ``micro_size`` clips from position ``(a * world_size + r) * micro_size`` of each
    global batch, so the global batch does not depend on the number of ranks. Samples left at the end of an epoch
    that do not fill a batch are not used; they differ from epoch to epoch.

    With repeated sampling a global batch has ``global_size / repeats`` videos, in pairs: repeat 0 of both, repeat 1
    of both and so on. So neighbours are different videos (except for the last of an odd number), and the clips of a
    video are close together, so that one worker decodes it once.
    """

    num_samples: int
    global_size: int
    micro_size: int
    rank: int
    world_size: int
    seed: int
    repeats: int = 1
    start_step: int = 0
    end_step: int

    def __post_init__(self) -> None:
        if self.global_size % (self.micro_size * self.world_size):
            raise ValueError(
                f"micro_size={self.micro_size} x world_size={self.world_size} does not divide {self.global_size}"
            )
        if self.repeats < 1 or self.global_size % self.repeats:
            raise ValueError(f"repeats={self.repeats} does not divide global_size={self.global_size}")
        self.steps_per_epoch = self.num_samples * self.repeats // self.global_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{self.num_samples} samples, drawn {self.repeats} times, make no batch of {self.global_size}"
            )

    def __len__(self) -> int:
        return (self.end_step - self.start_step) * (self.global_size // (self.micro_size * self.world_size))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order_epoch, order = -1, np.empty(0, dtype=np.int64)
        num_videos = self.global_size // self.repeats
        for step in range(self.start_step, self.end_step):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(self.num_samples, self.seed, epoch)
            videos = order[step_in_epoch * num_videos :][:num_videos]
            batch = [
                SampleKey(epoch, int(index), repeat)
                for start in range(0, num_videos, 2)
                for repeat in range(self.repeats)
                for index in videos[start : start + 2]
            ]
            first = self.rank * self.micro_size
            for start in range(first, self.global_size, self.world_size * self.micro_size):
                yield batch[start : start + self.micro_size]
