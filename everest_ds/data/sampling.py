"""Which samples make up a step, which frames make up a clip, and where every random draw comes from.

Place in the flow: (seed, epoch, sample index, repeat) -> random generator -> frame indices. Nothing here reads
the state of a worker or a rank, so the same global batch comes out on any number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from torch.utils.data import Sampler


class Stream(IntEnum):
    """What a draw is for; each purpose has its own stream, so that adding a draw to one shifts no other."""

    ORDER = 0
    FRAMES = 1
    CROP = 2
    FLIP = 3
    SELECTION = 4
    REPLACEMENT = 5


@dataclass(frozen=True)
class SampleKey:
    """Names one clip of a run: which sample, in which epoch, as which repeat."""

    epoch: int
    index: int
    repeat: int = 0


def keyed_generator(seed: int, stream: Stream, epoch: int, index: int = 0, repeat: int = 0) -> np.random.Generator:
    """Return the generator that belongs to a sample and a purpose.

    Philox is counter-based: key and counter say where in its sequence the draws start, so no two samples share
    draws and none depends on another.
    """
    key = np.array([seed, int(stream)], dtype=np.uint64)
    counter = np.array([0, repeat, index, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def stride_indices(num_frames: int, clip_length: int, stride: int, generator: np.random.Generator) -> list[int]:
    """Return the frames of one clip: every ``stride``-th from a random start.

    A video shorter than ``clip_length * stride`` frames starts at 0; one that runs out repeats the last frame that
    its stride reaches.

    Source: official code, the pre-training loader's indices (golden frame_sampling.json, pretrain_train).
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1")
    num_starts = num_frames - clip_length * stride + 1
    start = int(generator.integers(num_starts)) if num_starts > 0 else 0
    # The official loop advances only while another frame lies beyond the one it would reach.
    last_reachable = max(num_frames - 2 - start, 0) // stride
    return [start + min(step, last_reachable) * stride for step in range(clip_length)]


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of all samples in an epoch; depends on the seed and the epoch alone."""
    return keyed_generator(seed, Stream.ORDER, epoch).permutation(num_samples)


@dataclass(kw_only=True, eq=False)
class GlobalBatchSampler(Sampler[list[SampleKey]]):
    """Yields this process's micro-batches of the run, epoch after epoch, from any step on.

    Micro-step a of process r takes the slice ``(a * world_size + r) * micro_size`` of each global batch, so the
    global batch is the same whatever the number of processes. The rest of an epoch that makes no whole batch is
    left out; another order leaves out others.
    """

    num_samples: int
    global_size: int
    micro_size: int
    rank: int
    world_size: int
    seed: int
    start_step: int = 0
    end_step: int

    def __post_init__(self) -> None:
        """Check that steps can be made."""
        if self.global_size % (self.micro_size * self.world_size):
            raise ValueError(
                f"micro_size={self.micro_size} x world_size={self.world_size} does not divide {self.global_size}"
            )
        self.steps_per_epoch = self.num_samples // self.global_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"{self.num_samples} samples make no batch of {self.global_size}")

    def __len__(self) -> int:
        """Return the number of micro-batches that are left."""
        return (self.end_step - self.start_step) * (self.global_size // (self.micro_size * self.world_size))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order_epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start_step, self.end_step):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(self.num_samples, self.seed, epoch)
            batch = order[step_in_epoch * self.global_size :][: self.global_size]
            first = self.rank * self.micro_size
            for start in range(first, self.global_size, self.world_size * self.micro_size):
                yield [SampleKey(epoch, int(index)) for index in batch[start : start + self.micro_size]]
