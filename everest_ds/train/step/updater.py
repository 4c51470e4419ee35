"""From a micro-batch to gradients, and from gradients to new weights.

Place in the flow: inputs on the device -> `Updater.forward_backward` -> `Updater.step` -> weights.

Gradients are clipped by their global norm, and a step is skipped if a gradient is not finite. `FlatUpdater` does
both without synchronisation: the norm stays on the device, and AdamW's fused kernel gets the two tensors that
torch's gradient scaler would pass, a divisor of the gradients and whether to skip. `DeepSpeedUpdater` takes
DeepSpeed's own path. At ZeRO-2, and with float32 weights also at ZeRO-0 and 1, it does not synchronise either. In
all other cases (ZeRO-3, an offloaded optimiser, ZeRO-0 and 1 in bfloat16) DeepSpeed synchronises several times a
step.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from everest_ds.config import OptimConfig
from everest_ds.train.step.device_feed import Inputs
from everest_ds.train.step.gradients import FlatGradients, choose_gradients
from everest_ds.train.step.graph import CapturedCompute
from everest_ds.train.step.stopwatch import Stopwatch

# Added to the norm before gradients are divided, as DeepSpeed and torch do.
CLIP_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of an optimiser step, as scalars on the device (no synchronisation).

    Attributes:
        grad_norm: Global gradient norm before clipping; not finite if the step was skipped.
        applied: False if a gradient was not finite, so that no weight was changed; bool.
    """

    grad_norm: Tensor
    applied: Tensor


class Updater(ABC):
    """Takes the optimiser steps of an engine whose checkpoint is loaded."""

    graph: CapturedCompute | None = None
    """Replays forward and backward; None if they are computed eagerly from the start."""
    stopwatch: Stopwatch | None = None
    """Time of this rank's own work on gradients; None if it would include waiting for other ranks."""

    @abstractmethod
    def forward_backward(self, inputs: Inputs) -> Tensor:
        """Compute loss and gradients of a micro-batch; return the loss, a scalar on the device."""

    @abstractmethod
    def step(self) -> StepResult | None:
        """Update the weights if all gradients are finite; return None while accumulation is not complete."""


def make_updater(engine: Any, config: OptimConfig, ds_config: dict[str, Any], *, captures: bool = False) -> Updater:
    """Return the updater for an engine whose checkpoint is loaded.

    Args:
        engine: The DeepSpeed engine around a task, with `optim.make_optimizer`'s AdamW.
        config: How gradients are stored and clipped.
        ds_config: The engine's resolved configuration.
        captures: Whether forward and backward are replayed as a CUDA graph (`graph.why_eager` returned None).
    """
    if choose_gradients(config.gradients, ds_config) == "flat":
        return FlatUpdater(engine, config.max_grad_norm, captures=captures)
    return DeepSpeedUpdater(engine, config.max_grad_norm)


class FlatUpdater(Updater):
    """Takes steps with gradients in flat rows, and advances DeepSpeed's counters as its own steps would."""

    def __init__(self, engine: Any, max_norm: float, *, captures: bool = False) -> None:
        self._engine = engine
        self._max_norm = max_norm
        self.graph = CapturedCompute(self.compute, engine.module) if captures else None
        self._gradients = FlatGradients(engine)
        self.stopwatch: Stopwatch = Stopwatch(engine.device)
        self._num_micro_steps: int = engine.gradient_accumulation_steps()
        self._autocast_dtype = torch.bfloat16 if engine.torch_autocast_enabled() else None

    def forward_backward(self, inputs: Inputs) -> Tensor:
        """Compute loss and gradients of a micro-batch, and reduce the gradients over all ranks."""
        with self.stopwatch.running():
            loss = (self.graph or self.compute)(*inputs)
        done = self._engine.micro_steps % self._num_micro_steps
        self._gradients.reduce(first=done == 0, last=done + 1 == self._num_micro_steps)
        return loss

    def compute(self, *inputs: Tensor) -> Tensor:
        """Compute loss and gradients of this rank, the latter into the rows.

        It does not communicate and, if the task's shapes are fixed, does not synchronise.
        """
        dtype = self._autocast_dtype
        with torch.autocast(self._engine.device.type, dtype=dtype, enabled=dtype is not None):
            loss: Tensor = self._engine.module(*inputs)
        (loss / self._num_micro_steps).backward()
        self._gradients.collect()
        return loss.detach()

    def step(self) -> StepResult | None:
        """Update the weights if all gradients are finite; return None while accumulation is not complete."""
        engine = self._engine
        engine.micro_steps += 1
        if engine.micro_steps % self._num_micro_steps:
            return None
        norm = self._gradients.norm()
        applied = norm.isfinite()
        optimizer = _bare_optimizer(engine)
        _tell_kernel(optimizer, norm, applied, self._max_norm)
        for row in self._gradients.rows:
            row.hand_over()
        optimizer.step()
        for row in self._gradients.rows:
            row.release()
        self._gradients.publish()
        engine.global_steps += 1
        engine.global_samples += engine.train_batch_size()
        return StepResult(grad_norm=norm, applied=applied)


class DeepSpeedUpdater(Updater):
    """Takes the steps of DeepSpeed's own path.

    DeepSpeed's checkpoints restore the clipping of the run that wrote them; here this run's clipping is set again.
    """

    def __init__(self, engine: Any, max_norm: float) -> None:
        self._engine = engine
        self._max_norm = max_norm
        self._decides = _can_decide_on_device(engine)
        if self._decides:
            _silence(engine)
        elif hasattr(engine.optimizer, "clip_grad"):
            engine.optimizer.clip_grad = max_norm

    def forward_backward(self, inputs: Inputs) -> Tensor:
        loss: Tensor = self._engine(*inputs)
        self._engine.backward(loss)
        return loss.detach()

    def step(self) -> StepResult | None:
        """Update the weights if all gradients are finite; return None while accumulation is not complete."""
        engine = self._engine
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
            return None
        if not self._decides:
            return _step_of_deepspeed(engine)
        norm = global_norm(_reduced_gradients(engine), _group_of_shards(engine), engine.device)
        applied = norm.isfinite()
        _tell_kernel(_bare_optimizer(engine), norm, applied, self._max_norm)
        engine.step()
        return StepResult(grad_norm=norm, applied=applied)


def global_norm(gradients: Sequence[Tensor], group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Return the norm over all gradients of all ranks, a float32 scalar on the device.

    Args:
        gradients: This rank's gradients.
        group: The ranks that have the other parts; None if each rank has all gradients.
        device: The gradients' device.
    """
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total.sqrt().float()


def _tell_kernel(optimizer: torch.optim.Optimizer, norm: Tensor, applied: Tensor, max_norm: float) -> None:
    """Set the divisor of gradients, and whether to skip the step, for AdamW's fused kernel."""
    kernel_inputs = vars(optimizer)
    kernel_inputs["found_inf"] = (~applied).float()
    if max_norm:
        kernel_inputs["grad_scale"] = ((norm + CLIP_EPS) / max_norm).clamp(min=1)


def _can_decide_on_device(engine: Any) -> bool:
    if not _bare_optimizer(engine).defaults.get("fused"):
        return False
    if engine.zero_optimization_stage() == 0:
        return not engine.bfloat16_enabled()
    # At ZeRO-1 in bfloat16, DeepSpeed uses another class of optimiser, which stores gradients elsewhere.
    keeps_shards = hasattr(engine.optimizer, "averaged_gradients")
    return engine.zero_optimization_stage() < 3 and keeps_shards and not engine.optimizer.cpu_offload


def _silence(engine: Any) -> None:
    """Stop DeepSpeed from checking, measuring and clipping gradients, whatever its configuration says."""
    engine._config.gradient_clipping = 0.0
    if engine.zero_optimization_stage():
        engine.optimizer.clip_grad = 0.0
        engine.optimizer.check_grad_overflow = False
        engine.optimizer.compute_grad_norm = False


def _bare_optimizer(engine: Any) -> torch.optim.Optimizer:
    bare: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return bare


def _reduced_gradients(engine: Any) -> list[Tensor]:
    """Return the gradients of the weights that this rank updates: its shard's, or all without ZeRO."""
    if engine.zero_optimization_stage() == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    return [gradient for group in engine.optimizer.averaged_gradients.values() for gradient in group]


def _group_of_shards(engine: Any) -> dist.ProcessGroup | None:
    return engine.optimizer.dp_process_group if engine.zero_optimization_stage() else None


def _step_of_deepspeed(engine: Any) -> StepResult:
    """Let DeepSpeed check the gradients of all ranks, and skip the step if one is not finite."""
    skipped_before = engine.skipped_steps
    engine.step()
    norm, applied = engine.get_global_grad_norm(), engine.skipped_steps == skipped_before
    return StepResult(
        grad_norm=norm if isinstance(norm, Tensor) else torch.full((), norm, device=engine.device),
        applied=torch.full((), applied, dtype=torch.bool, device=engine.device),
    )
