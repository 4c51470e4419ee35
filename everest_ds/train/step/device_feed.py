"""From the loader to the device: on a GPU, a batch is copied while the previous one is computed.

Place in the flow: ClipBatch in pinned memory -> the task's inputs on the device.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from everest_ds.data.clips.batch import ClipBatch
from everest_ds.data.loading.loader import BatchIterator

Inputs = tuple[Tensor, ...]


class DeviceFeed:
    """Iterates over batches, each with its tensors on the device.

    On a GPU, `look_ahead` starts to copy the next batch on a separate stream, if one is ready, so the device copies
    while it computes. Elsewhere it does nothing.

    Args:
        batches: The loader's batches.
        move: Moves the task's inputs from a batch to a device.
        device: The target device.

    Attributes:
        waited_s: Seconds that `next` has waited for the loader.
    """

    def __init__(
        self,
        batches: Iterator[ClipBatch],
        move: Callable[[ClipBatch, torch.device], Inputs],
        device: torch.device,
    ) -> None:
        self._batches, self._move, self._device = batches, move, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[ClipBatch, Inputs] | None = None
        self.waited_s = 0.0

    def next(self) -> tuple[ClipBatch, Inputs]:
        """Return the next batch; raise StopIteration after the last one."""
        if self._ahead is None:
            began = time.perf_counter()
            batch = next(self._batches)
            self.waited_s += time.perf_counter() - began
            return batch, self._move(batch, self._device)
        assert self._stream is not None
        (batch, inputs), self._ahead = self._ahead, None
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for tensor in inputs:
            tensor.record_stream(computing)
        return batch, inputs

    def look_ahead(self) -> None:
        """Start to copy the next batch; call this after the work on the current one was queued."""
        is_ready = isinstance(self._batches, BatchIterator) and self._batches.is_ready
        if self._stream is None or self._ahead is not None or not is_ready:
            return
        batch = next(self._batches, None)
        if batch is not None:
            with torch.cuda.stream(self._stream):
                self._ahead = batch, self._move(batch, self._device)
