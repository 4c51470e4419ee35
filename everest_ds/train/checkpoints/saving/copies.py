"""Copies of tensors in memory that a rank shares with its writer, the process that saves them.

Place in the flow: the content of a checkpoint's file -> `Copies.pack` copies each of its storages once, and returns
the rest as bytes -> `Unpacker`, in the writer, restores the content with storages in the same memory.

The memory is anonymous, not in /dev/shm, whose size containers limit. It is kept between saves, because allocating
it takes longer than copying into it. If storages come from a GPU, it is pinned.
"""

import io
import mmap
import os
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.storage import TypedStorage, UntypedStorage

# The smallest allocation.
SEGMENT_BYTES = 64 * 2**20
# Copies start at multiples of this, which is a multiple of every element's size and of a CPU cache line.
_ALIGNMENT = 64


class Extent(NamedTuple):
    """Where the copy of a storage is."""

    segment: int
    start: int
    num_bytes: int


class Copies:
    """The rank's side of the shared memory.

    Args:
        device: The device of most tensors.
        share: Called with the descriptor and the size of each new segment; afterwards the descriptor is closed.
    """

    def __init__(self, device: torch.device, share: Callable[[int, int], None]) -> None:
        self._device, self._share = device, share
        self._segments: list[Tensor] = []
        self._segment = self._start = 0

    @property
    def num_bytes(self) -> int:
        """Allocated host memory."""
        return sum(segment.numel() for segment in self._segments)

    def reserve(self, num_bytes: int) -> None:
        """Allocate memory before it is used.

        Raises:
            OSError: There is not enough.
        """
        if num_bytes:
            self._segments.append(self._take(num_bytes))

    def clear(self) -> None:
        """Allow all copies to be overwritten; call it when the writer has finished."""
        self._segment = self._start = 0

    def pack(self, content: Any) -> bytes:
        """Copy every storage in an object, and return the rest of the object as bytes.

        Copies from a GPU may still run until `wait`. Until then their storages may be freed, but other streams must
        not change them.

        Raises:
            OSError: There is not enough memory.
        """
        stream = io.BytesIO()
        _Packer(stream, self._copy).dump(content)
        return stream.getvalue()

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _copy(self, storage: UntypedStorage) -> Extent:
        extent = self._reserve(storage.nbytes())
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        target = self._segments[extent.segment][extent.start : extent.start + extent.num_bytes]
        target.copy_(source, non_blocking=True)
        return extent

    def _reserve(self, num_bytes: int) -> Extent:
        while self._segment < len(self._segments):
            if self._start + num_bytes <= self._segments[self._segment].numel():
                break
            self._segment, self._start = self._segment + 1, 0
        else:
            self._segments.append(self._take(max(num_bytes, SEGMENT_BYTES)))
        extent = Extent(self._segment, self._start, num_bytes)
        self._start += (
            -(-max(num_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
        )  # at least 1, so that empty storages have different extents
        return extent

    def _take(self, num_bytes: int) -> Tensor:
        """Allocate and populate memory, and share it."""
        file = os.memfd_create("everest-checkpoint")
        try:
            os.posix_fallocate(file, 0, num_bytes)
            memory = mmap.mmap(file, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self._share(file, num_bytes)
        finally:
            os.close(file)
        taken = torch.frombuffer(memory, dtype=torch.uint8)
        if self._device.type == "cuda":
            status = torch.cuda.cudart().cudaHostRegister(taken.data_ptr(), num_bytes, 0)
            if int(status):
                raise OSError(
                    f"{num_bytes / 2**20:.0f} MiB of host memory cannot be pinned: CUDA error {int(status)}"
                )
        return taken


class Unpacker:
    """The writer's side of the shared memory."""

    def __init__(self) -> None:
        self._segments: list[Tensor] = []

    def add(self, file: int, num_bytes: int) -> None:
        """Map the next segment, and close its descriptor."""
        try:
            self._segments.append(torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8))
        finally:
            os.close(file)

    def unpack(self, packed: bytes) -> Any:
        """Return the packed object, with its storages in the shared memory."""
        return _Unpickler(io.BytesIO(packed), self._storage_at).load()

    def _storage_at(self, extent: Extent) -> UntypedStorage:
        if not extent.num_bytes:
            return UntypedStorage(0)
        segment = self._segments[extent.segment].numpy()
        return torch.from_numpy(segment[extent.start : extent.start + extent.num_bytes]).untyped_storage()


class _Packer(pickle.Pickler):
    """Pickles as torch.save does: the storages of tensors are kept separately."""

    def __init__(self, stream: io.BytesIO, copy: Callable[[UntypedStorage], Extent]) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._copy = copy
        # Keeps storages alive until the end, because a new storage may get the address of a freed one.
        self._copied: dict[int, tuple[UntypedStorage, Extent]] = {}

    def persistent_id(self, content: Any) -> tuple[Extent, torch.dtype] | None:
        """Return the extent of a storage's copy, and its type; None for other objects, which are pickled."""
        if not torch.is_storage(content):
            return None
        storage: Any = content
        dtype = torch.uint8
        if isinstance(storage, TypedStorage):
            storage, dtype = storage._untyped_storage, storage.dtype
        address = storage._cdata
        if address not in self._copied:
            self._copied[address] = storage, self._copy(storage)
        return self._copied[address][1], dtype


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, storage_at: Callable[[Extent], UntypedStorage]) -> None:
        super().__init__(stream)
        self._storage_at = storage_at
        self._found: dict[Extent, UntypedStorage] = {}

    def persistent_load(self, saved: tuple[Extent, torch.dtype]) -> TypedStorage:
        extent, dtype = saved
        if extent not in self._found:
            self._found[extent] = self._storage_at(extent)
        return TypedStorage(wrap_storage=self._found[extent], dtype=dtype, _internal=True)
