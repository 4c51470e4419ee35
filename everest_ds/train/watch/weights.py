"""Detects silent corruption: compares checksums of the weights that all ranks have in common.

Checksums are computed on the device in every step, after the gradients and before the update. A bit that changed
since the last update has affected the gradients by then, and at ZeRO-1 and 2 the update replaces the weights of all
ranks. They are compared every few steps and before each checkpoint, so no checkpoint contains steps with different
weights.

A checksum is the sum of the bits as integers, so it is exact. It covers, by ZeRO stage:

    0     all weights and buffers; at each comparison also the optimiser's states, of which all ranks have a copy
    1, 2  all weights and buffers of the model; each rank's float32 part exists only on that rank
    3     buffers, and the small parameters that stay gathered; the others are partitioned among the ranks
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everest_ds import distributed
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.train.callbacks import Callback
from everest_ds.train.checkpoints.save import TrainState
from everest_ds.train.record.metrics import MetricsLog

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SameWeights(Callback):
    """Ends a run whose ranks compute with different weights.

    Args:
        engine: The DeepSpeed engine.
        run_dir: The run directory, for the message.
        world: This rank and the number of ranks.
        log: The record.
        every: Steps between two comparisons.
        start_step: The step at which this launch starts.
    """

    def __init__(
        self, engine: Any, run_dir: Path, world: World, log: MetricsLog, *, every: int, start_step: int
    ) -> None:
        self._engine, self._run_dir, self._world, self._log, self._every = engine, run_dir, world, log, every
        self._saved_step = start_step
        self._tensors = [*engine.module.parameters(), *engine.module.buffers()]
        self._pointers: list[int] = []
        self._held: list[Tensor] = []
        self._sums: list[tuple[int, Tensor]] = []

    def before_update(self, step: int) -> None:
        """Compute a checksum, and compare if it is time.

        Raises:
            UserError: The ranks differ; names them, and the last checkpoint at which they agreed.
        """
        pointers = [tensor.data_ptr() for tensor in self._tensors]
        if pointers != self._pointers:  # cached: finding shared memory takes the host as long as summing it
            self._pointers, self._held = pointers, list(held_by_all(self._tensors))
        tensors = list(self._held)
        if step % self._every == 0 and self._engine.zero_optimization_stage() == 0:
            tensors += optimizer_states(self._engine)
        self._sums.append((step, sum_of_bits(tensors, self._engine.device)))
        if step % self._every == 0:
            self._compare()

    def on_save(self, state: TrainState) -> TrainState:
        """Compare what has not been compared yet; see `before_update`."""
        self._compare()
        self._saved_step = state.step
        return state

    def _compare(self) -> None:
        taken, self._sums = self._sums, []
        if not taken:
            return
        equal = distributed.are_same(torch.stack([total for _, total in taken])).tolist()  # synchronises
        if all(equal):
            return
        step, own = taken[equal.index(False)]
        everyone = distributed.gather_objects(int(own))
        common = Counter(everyone).most_common(2)
        ranks = [rank for rank, value in enumerate(everyone) if value != common[0][0]]
        if len(common) > 1 and common[0][1] == common[1][1]:  # there is no majority
            ranks = list(range(len(everyone)))
        self._log.write("event", step, event="weights_differ", ranks=ranks)
        distributed.barrier()  # once a rank has ended, the launcher ends rank zero
        raise UserError(self._describe(step, ranks))

    def _describe(self, step: int, ranks: Sequence[int]) -> str:
        named = ", ".join(map(str, ranks))
        whose = f"rank {named} computes with other weights than its peers"
        if len(ranks) == self._world.size:
            whose = f"ranks {named} compute with different weights"
        last = "the start" if not self._saved_step else f"step-{self._saved_step:08d}"
        return (
            f"{whose} at step {step}: memory, a GPU or a link has corrupted bits. They agreed up to {last} "
            f"in {self._run_dir}; the same command resumes there. If it happens again, use other machines"
        )


def held_by_all(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """Yield the parameters and buffers that all ranks have whole; shared memory only once."""
    seen = set()
    for tensor in tensors:
        if hasattr(tensor, "ds_tensor"):
            if getattr(tensor, "ds_persist", False):
                yield tensor.detach()
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or not tensor.numel():
            continue
        seen.add(storage.data_ptr())
        # Parameters that are views of one flat row are summed together.
        yield torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)


def optimizer_states(engine: Any) -> list[Tensor]:
    """Return the optimiser's states and float32 weights; at ZeRO-0 they are equal on all ranks."""
    bare = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [value for state in bare.state.values() for value in state.values() if isinstance(value, Tensor)]
    return states + [weight.detach() for group in bare.param_groups for weight in group["params"]]


def sum_of_bits(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the bits as integers, modulo 2^64: an int64 scalar on the device, no synchronisation."""
    sums = [part.sum(dtype=torch.int64) for tensor in tensors for part in _as_integers(tensor)]
    return torch.stack([total.to(device) for total in sums]).sum() if sums else torch.zeros((), dtype=torch.int64)


def _as_integers(tensor: Tensor) -> Iterable[Tensor]:
    """Yield a tensor's bits as integers: int64, which are added fastest, and a rest of bytes."""
    flat = tensor.reshape(-1).contiguous()
    each = 8 // flat.element_size()
    if flat.storage_offset() % each:
        flat = flat.clone()
    small = flat.view(_INTEGERS[flat.element_size()])
    bulk = len(small) - len(small) % each
    yield from (part for part in (small[:bulk].view(torch.int64), small[bulk:]) if len(part))
