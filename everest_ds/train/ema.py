"""An exponential moving average of the weights, sharded over the ranks, for validation and export.

Place in the flow: engine step -> `update`; validation inside `swapped`; `write_checkpoint` before the folder is
sealed; `load` with any number of processes and any stage.

Every rank averages the slice of each trainable parameter that it would have at ZeRO-3: rank r of N has elements
[r n, (r + 1) n) with n = ceil(size / N). So an update needs no communication. It takes 4 bytes x trainable
parameters / N on the weights' device, at every stage, and while swapped the same number of elements again in the
weights' dtype. The average is float32. It averages the model's weights, which in bfloat16 are rounded from the
optimiser's float32 weights.
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
        engine: The DeepSpeed engine, with the weights that the run starts with.
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
        """Update the average with the weights of a step.

        Args:
            applied: Whether the step changed the weights, a bool scalar on the device; if not, the averages do not
                change.
        """
        share = applied * (1 - self.decay)
        for name, parameter in self._parameters.items():
            self._slices[name].lerp_(_slice(parameter).float(), share)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Replace the weights by the averages inside this block; all ranks take part, between two steps.

        Afterwards the weights are bitwise identical to before. After an error inside, the averages stay in place,
        because restoring the weights needs all ranks, and the error may have occurred on one of them.
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
            for _ in self.whole():  # gathering needs all ranks
                pass

    def load(self, folder: Path) -> None:
        """Load the averages of a checkpoint, from any number of processes and any stage.

        Raises:
            UserError: There are none, or their names or shapes differ from the trained parameters.
        """
        tensors = read_average(folder)
        shapes = {name: tuple(_shape(parameter)) for name, parameter in self._parameters.items()}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
            odd = sorted(tensors.keys() ^ shapes.keys()) or [n for n in shapes if tensors[n].shape != shapes[n]]
            raise UserError(
                f"{folder / AVERAGE} does not match the trained weights: {', '.join(odd[:4])}; resume with the "
                "model that the run was trained with"
            )
        for name, parameter in self._parameters.items():
            start, count = _extent(parameter)
            self._slices[name].copy_(tensors[name].flatten()[start : start + count])

    @torch.no_grad()
    def _put(self, slices: dict[str, Tensor]) -> None:
        """Replace the weights by slices: gathered, and at ZeRO-3 also in the partitions."""
        partitioned = _is_partitioned(self._parameters.values())
        if partitioned:  # release all gathered parameters, also the small ones that usually stay
            self._engine.optimizer.checkpoint_event_prologue()
        for name, parameter in self._parameters.items():
            if partitioned:
                _slice(parameter).copy_(slices[name])
            else:
                whole = _gather(slices[name].to(parameter.dtype), parameter, self._engine.device)
                parameter.copy_(whole)
        if partitioned:  # gather the small parameters again
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
    """Return a whole parameter, detached. At ZeRO-3, where each rank has a part, all ranks take part."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.data
    return _gather(_slice(parameter), parameter, device)


def _is_partitioned(parameters: Any) -> bool:
    return any(hasattr(parameter, "ds_tensor") for parameter in parameters)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _extent(parameter: nn.Parameter) -> tuple[int, int]:
    """Return the start and the length of this rank's slice of a flattened parameter."""
    numel = _shape(parameter).numel()
    each = -(-numel // dist.get_world_size())
    start = min(dist.get_rank() * each, numel)
    return start, min(each, numel - start)


def _slice(parameter: nn.Parameter) -> Tensor:
    """Return this rank's slice as a view of the partition at ZeRO-3 (without padding), else of the parameter."""
    start, count = _extent(parameter)
    partition = getattr(parameter, "ds_tensor", None)
    if partition is not None:
        return partition.data[:count]
    return parameter.data.view(-1)[start : start + count]


def _gather(local: Tensor, parameter: nn.Parameter, device: torch.device) -> Tensor:
    """Gather the slices of all ranks into the parameter's shape."""
    shape, world = _shape(parameter), dist.get_world_size()
    each = -(-shape.numel() // world)
    padded = torch.zeros(each, dtype=local.dtype, device=device)
    padded[: len(local)] = local
    flat = torch.empty(each * world, dtype=local.dtype, device=device)
    distributed.all_gather_single(flat, padded, None)
    return flat[: shape.numel()].view(shape)
