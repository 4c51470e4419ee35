"""Silent corruption: checksums of the weights that all ranks hold alike, compared over the ranks.

Taken on the device after the gradients of every step, before its update: a bit that changed since the last update
has had its effect on the gradients by then, and at ZeRO-1 and 2 the update replaces the weights of all ranks.
Compared every few steps and before each checkpoint, so that no checkpoint is of steps whose weights differed.

A checksum is the sum of the bits, as integers, and so exact. It covers, by ZeRO stage:

    0     all weights and buffers; from time to time also the optimiser's states, of which all ranks have a copy
    1, 2  all weights and buffers that the model computes with; each rank's float32 part is on that rank alone
    3     buffers, and the parameters that stay gathered (small ones); of the others each rank has a part of its own
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
    """Stops a run whose ranks compute with different weights.

    Args:
        engine: The DeepSpeed engine.
        run_dir: The run directory, for the message.
        world: This rank and how many there are.
        log: The record.
        every: Steps from one comparison to the next.
        start_step: The step that this start begins with.
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
        """Take a checksum, and compare where it is due.

        Raises:
            UserError: The ranks differ; names them, and the last checkpoint of steps in which they did not.
        """
        pointers = [tensor.data_ptr() for tensor in self._tensors]
        if pointers != self._pointers:  # to look for what shares memory takes the host as long as to sum it
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
        equal = distributed.are_same(torch.stack([total for _, total in taken])).tolist()  # waits for the device
        if all(equal):
            return
        step, own = taken[equal.index(False)]
        everyone = distributed.gather_objects(int(own))
        common = Counter(everyone).most_common(2)
        ranks = [rank for rank, value in enumerate(everyone) if value != common[0][0]]
        if len(common) > 1 and common[0][1] == common[1][1]:  # nobody is in the majority
            ranks = list(range(len(everyone)))
        self._log.write("event", step, event="weights_differ", ranks=ranks)
        distributed.barrier()  # the launcher ends rank zero once another rank has ended
        raise UserError(self._describe(step, ranks))

    def _describe(self, step: int, ranks: Sequence[int]) -> str:
        named = ", ".join(map(str, ranks))
        whose = f"rank {named} computes with other weights than its peers"
        if len(ranks) == self._world.size:
            whose = f"ranks {named} compute with different weights"
        last = "the start" if not self._saved_step else f"step-{self._saved_step:08d}"
        return (
            f"{whose} at step {step}: a memory, a GPU or a link has changed bits. They agreed up to {last} "
            f"in {self._run_dir}; the same command resumes there, on other machines if this comes again"
        )


def held_by_all(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """Yield those parameters and buffers that all ranks hold whole; of shared memory each piece once."""
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
        # Parameters that DeepSpeed keeps in one row are summed as one.
        yield torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)


def optimizer_states(engine: Any) -> list[Tensor]:
    """Return the states and float32 weights that the optimiser keeps; at ZeRO-0 all ranks have the same ones."""
    bare = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [value for state in bare.state.values() for value in state.values() if isinstance(value, Tensor)]
    return states + [weight.detach() for group in bare.param_groups for weight in group["params"]]


def sum_of_bits(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the sum of all bits as integers, modulo 2^64: a scalar int64 on the device, no synchronisation."""
    sums = [part.sum(dtype=torch.int64) for tensor in tensors for part in _as_integers(tensor)]
    return torch.stack([total.to(device) for total in sums]).sum() if sums else torch.zeros((), dtype=torch.int64)


def _as_integers(tensor: Tensor) -> Iterable[Tensor]:
    """Yield a tensor's bits as integers: of eight bytes, which are added fastest, and a rest."""
    flat = tensor.reshape(-1).contiguous()
    each = 8 // flat.element_size()
    if flat.storage_offset() % each:
        flat = flat.clone()
    small = flat.view(_INTEGERS[flat.element_size()])
    bulk = len(small) - len(small) % each
    yield from (part for part in (small[:bulk].view(torch.int64), small[bulk:]) if len(part))
