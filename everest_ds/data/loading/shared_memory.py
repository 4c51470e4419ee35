"""Memory that processes share, in places of one size: what one process writes there, no process has to send."""

import mmap
import os
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """A tensor's shape, and which of its axes come first in memory; without gaps between its elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """Return the layout of a copy of a tensor, its axes in the same order in memory."""
        copy = torch.empty_like(tensor, device="meta")
        return cls(tuple(copy.shape), copy.stride())


class Places:
    """Places in memory that is neither of the file system nor of /dev/shm, whose size containers bound.

    Only what was written to takes memory, so a place may be larger than what mostly goes into it. Can be handed to
    a process that is being started.

    Args:
        count: How many places there are.
        num_bytes: Bytes of each.
    """

    _file = -1

    def __init__(self, count: int, num_bytes: int) -> None:
        self._open(os.memfd_create("everest-clips"), count, num_bytes)

    def _open(self, file: int, count: int, num_bytes: int) -> None:
        self._file, self.count, self.num_bytes = file, count, num_bytes
        os.ftruncate(file, count * num_bytes)
        self._bytes = torch.frombuffer(mmap.mmap(file, count * num_bytes), dtype=torch.uint8)

    def view(self, place: int, layout: Layout) -> Tensor:
        """Return the beginning of a place as a uint8 tensor; writing to it writes there.

        Raises:
            ValueError: It does not fit.
        """
        size = torch.Size(layout.shape).numel()
        if size > self.num_bytes:
            raise ValueError(f"{size} bytes do not fit into a place of {self.num_bytes}")
        return self._bytes.as_strided(layout.shape, layout.stride, place * self.num_bytes)

    def close(self) -> None:
        """Give up the file; memory goes when the last view of it does."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., "Places"], tuple[Any, ...]]:
        """Let it pass to a process that is being started."""
        return _reopen, (reduction.DupFd(self._file), self.count, self.num_bytes)


def _reopen(file: Any, count: int, num_bytes: int) -> Places:
    places = Places.__new__(Places)
    places._open(file.detach(), count, num_bytes)
    return places
