"""An exponential moving average of the weights, sharded over the ranks, for validation and export.

Place in the flow: engine step -> `update`; validation inside `swapped`; `write_checkpoint` before the folder is
sealed; `load` in any world and stage.

Every rank averages the slice of each trainable parameter that it also holds at ZeRO-3: rank r of N has elements
[r n, (r + 1) n) with n = ceil(size / N). So an update needs no communication. Memory on the weights' device is
4 bytes x trainable parameters / N at every stage; while swapped, as much again in the weights' own precision. The
averaged weights are those that the model computes with: in bfloat16 they are rounded from the optimiser's float32
ones. The average itself is float32.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from everest_ds import distributed
from everest_ds.errors import UserError
from everest_ds.model.weights.foreign import read_safetensors
from everest_ds.model.weights.reading import Weights, widen
from everest_ds.train.callbacks import Callback
from everest_ds.train.checkpoints.save import AVERAGE
from everest_ds.train.checkpoints.saving.files import CheckpointFiles
from everest_ds.train.step.updater import StepResult

PREFIX = "model."


class WeightAverage(Callback):
    """The moving average of an engine's trainable weights; it starts as a copy of them.

    Args:
        engine: The DeepSpeed engine, its weights as the run starts with them.
        decay: Share of the average that each update keeps, in (0, 1).

    Source: the official code's `--model_ema` (timm's `ModelEma`), of which this is the sharded form.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self._parameters: dict[str, nn.Parameter] = {name.removeprefix(PREFIX): p for name, p in trained}
        self._slices = {name: _slice(p).detach().float().clone() for name, p in self._parameters.items()}
        self.checkpoint_bytes = 4 * sum(_shape(p).numel() for p in self._parameters.values())

    def on_step(self, step: int, losses: Sequence[Tensor], result: StepResult) -> None:
        self.update(result.applied)

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Average in the weights that a step has just changed.

        Args:
            applied: Whether it changed them, a bool scalar on the device; if not, the averages stay as they are.
        """
        share = applied * (1 - self.decay)
        for name, parameter in self._parameters.items():
            self._slices[name].lerp_(_slice(parameter).float(), share)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Compute with the averages in place of the weights; all ranks take part, between two steps.

        Afterwards the weights are what they were, bit for bit. After an error inside, the averages stay in place:
        putting the weights back needs all ranks, and the error may have struck one.
        """
        kept = {name: _slice(parameter).detach().clone() for name, parameter in self._parameters.items()}
        self._put(self._slices)
        yield
        self._put(kept)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each average in its parameter's shape, float32, on the engine's device; all ranks take part."""
        for name, parameter in self._parameters.items():
            yield name, _gather(self._slices[name], parameter, self._engine.device)

    def write_checkpoint(self, files: CheckpointFiles) -> None:
        """Add the whole averages as one file; rank zero copies them to host memory. All ranks take part.

        Raises:
            OSError: The file cannot be written (on rank zero).
        """
        if dist.get_rank() == 0:
            files.add_tensors(AVERAGE, self.whole(), {"decay": str(self.decay)})
        else:
            for _ in self.whole():  # each is gathered from all ranks
                pass

    def load(self, folder: Path) -> None:
        """Load the averages of a checkpoint, whatever world and stage wrote it.

        Raises:
            UserError: There are none, or they are of other parameters than are trained here.
        """
        tensors = read_average(folder)
        shapes = {name: tuple(_shape(parameter)) for name, parameter in self._parameters.items()}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
            odd = sorted(tensors.keys() ^ shapes.keys()) or [n for n in shapes if tensors[n].shape != shapes[n]]
            raise UserError(
                f"{folder / AVERAGE} holds averages of other weights than are trained here: {', '.join(odd[:4])}"
            )
        for name, parameter in self._parameters.items():
            start, count = _extent(parameter)
            self._slices[name].copy_(tensors[name].flatten()[start : start + count])

    @torch.no_grad()
    def _put(self, slices: dict[str, Tensor]) -> None:
        """Make slices the weights that forward reads: gathered, or at ZeRO-3 also the partitions themselves."""
        partitioned = _is_partitioned(self._parameters.values())
        if partitioned:  # nothing stays gathered, not even the small parameters
            self._engine.optimizer.checkpoint_event_prologue()
        for name, parameter in self._parameters.items():
            if partitioned:
                _slice(parameter).copy_(slices[name])
            else:
                whole = _gather(slices[name].to(parameter.dtype), parameter, self._engine.device)
                parameter.copy_(whole)
        if partitioned:  # and the small ones are gathered anew
            self._engine.optimizer.checkpoint_event_epilogue()


def averaged(weights: Weights, folder: Path) -> Weights:
    """Return a checkpoint's weights with the moving average in place of the trained ones.

    Raises:
        UserError: There is no average, or it is not finite.
    """
    source = f"{weights.source}, {AVERAGE}"
    return replace(weights, tensors=weights.tensors | widen(read_average(folder), source), source=source)


def read_average(folder: Path) -> dict[str, Tensor]:
    """Return a checkpoint's averages, float32, under the model's own names; frozen weights have none."""
    path = folder / AVERAGE
    if not path.is_file():
        raise UserError(f"{folder} has no {AVERAGE}: the run was trained without optim.ema_decay")
    return read_safetensors(path)[0]


def gather_parameter(parameter: nn.Parameter, device: torch.device) -> Tensor:
    """Return a whole parameter, detached; at ZeRO-3, where ranks hold a part each, all of them take part."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.data
    return _gather(_slice(parameter), parameter, device)


def _is_partitioned(parameters: Any) -> bool:
    return any(hasattr(parameter, "ds_tensor") for parameter in parameters)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _extent(parameter: nn.Parameter) -> tuple[int, int]:
    """Return where this rank's slice of a flattened parameter starts, and its length."""
    numel = _shape(parameter).numel()
    each = -(-numel // dist.get_world_size())
    start = min(dist.get_rank() * each, numel)
    return start, min(each, numel - start)


def _slice(parameter: nn.Parameter) -> Tensor:
    """Return this rank's slice, a view: of the partition at ZeRO-3, without its padding, else of the whole."""
    start, count = _extent(parameter)
    partition = getattr(parameter, "ds_tensor", None)
    if partition is not None:
        return partition.data[:count]
    return parameter.data.view(-1)[start : start + count]


def _gather(local: Tensor, parameter: nn.Parameter, device: torch.device) -> Tensor:
    """Return the whole of every rank's slice, in the parameter's shape."""
    shape, world = _shape(parameter), dist.get_world_size()
    each = -(-shape.numel() // world)
    padded = torch.zeros(each, dtype=local.dtype, device=device)
    padded[: len(local)] = local
    flat = torch.empty(each * world, dtype=local.dtype, device=device)
    distributed.all_gather_single(flat, padded, None)
    return flat[: shape.numel()].view(shape)
