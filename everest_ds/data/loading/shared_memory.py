"""Memory shared by processes, in slots of one size: pixels written there need not be sent through a pipe."""

import mmap
import os
import weakref
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Shape and strides of a tensor without gaps between its elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """Return the layout of a dense copy that keeps the order of the axes in memory."""
        copy = torch.empty_like(tensor, device="meta")
        return cls(tuple(copy.shape), copy.stride())


class Slots:
    """Slots in anonymous memory, which can be passed to a process when it is started.

    The memory is not in /dev/shm, whose size containers limit. Only pages that were written occupy memory, so slots
    may be larger than most samples.

    Args:
        count: Number of slots.
        num_bytes: Bytes of each slot.
        file: Descriptor of memory that another process has created; closed with this object.
    """

    def __init__(self, count: int, num_bytes: int, file: int | None = None) -> None:
        self._file = os.memfd_create("everest-clips") if file is None else file
        weakref.finalize(self, os.close, self._file)  # views keep the mapping alive
        self.count, self.num_bytes = count, num_bytes
        os.ftruncate(self._file, count * num_bytes)
        self._bytes = torch.frombuffer(mmap.mmap(self._file, count * num_bytes), dtype=torch.uint8)

    def view(self, slot: int, layout: Layout) -> Tensor:
        """Return the beginning of a slot as a uint8 tensor that shares its memory.

        Raises:
            ValueError: The layout does not fit into a slot.
        """
        size = torch.Size(layout.shape).numel()
        if size > self.num_bytes:
            raise ValueError(f"{size} bytes do not fit into a slot of {self.num_bytes}")
        return self._bytes.as_strided(layout.shape, layout.stride, slot * self.num_bytes)

    def __reduce__(self) -> tuple[Callable[..., "Slots"], tuple[Any, ...]]:
        return _reopen, (self.count, self.num_bytes, reduction.DupFd(self._file))


def _reopen(count: int, num_bytes: int, file: Any) -> Slots:
    return Slots(count, num_bytes, file.detach())
