"""The optimiser step: gradients clipped by their global norm, and left out where one of them is not finite.

Place in the flow: backward -> gradients, reduced by DeepSpeed -> `Updater.step` -> weights.

At ZeRO-2, and with weights in float32 also at ZeRO-1 and without ZeRO, the host never waits for the device here.
The norm stays on the device, and AdamW's fused kernel is handed what torch's own gradient scaler hands it: what to
divide gradients by, and whether to leave weights and moments alone. DeepSpeed would ask the device several times a
step: for the norm of each parameter group, and for whether it may clip by it. In all other cases (ZeRO-3, an
offloaded optimiser, ZeRO-0 and 1 in bfloat16) it does so still; what comes of a step is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Added to the norm before gradients are divided, as DeepSpeed and torch do.
CLIP_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What became of a step, on the device: nobody has waited to see it.

    Attributes:
        grad_norm: Global gradient norm before clipping, a scalar; not finite where the step was left out.
        applied: False where a gradient was not finite, so that no weight was changed; a bool scalar.
    """

    grad_norm: Tensor
    applied: Tensor


class Updater:
    """Takes the optimiser steps of an engine; make it after a checkpoint has been loaded.

    A checkpoint of DeepSpeed's brings the clipping of the run that wrote it; here it becomes this run's.

    Args:
        engine: The DeepSpeed engine around a task, with `optim.make_optimizer`'s AdamW.
        max_norm: Global norm that gradients are clipped to; 0 does not clip.
    """

    def __init__(self, engine: Any, max_norm: float) -> None:
        self._engine = engine
        self._max_norm = max_norm
        self._decides = _can_decide_on_device(engine)
        if self._decides:
            _silence(engine)
        elif hasattr(engine.optimizer, "clip_grad"):
            engine.optimizer.clip_grad = max_norm

    def step(self) -> StepResult | None:
        """Update the weights where accumulation is complete and every gradient finite.

        Returns:
            What became of it; None while accumulation goes on.
        """
        engine = self._engine
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
            return None
        if not self._decides:
            return _step_of_deepspeed(engine)
        norm = global_norm(_reduced_gradients(engine), _group_of_shards(engine), engine.device)
        applied = norm.isfinite()
        kernel_inputs = vars(_bare_optimizer(engine))
        kernel_inputs["found_inf"] = (~applied).float()
        if self._max_norm:
            kernel_inputs["grad_scale"] = ((norm + CLIP_EPS) / self._max_norm).clamp(min=1)
        engine.step()
        return StepResult(grad_norm=norm, applied=applied)


def global_norm(gradients: Sequence[Tensor], group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Return the norm over all gradients of all processes, a float32 scalar on the device.

    Args:
        gradients: This process's.
        group: Processes that hold other parts; None where each holds all gradients.
        device: Theirs.
    """
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total.sqrt().float()


def _can_decide_on_device(engine: Any) -> bool:
    if not _bare_optimizer(engine).defaults.get("fused"):
        return False
    if engine.zero_optimization_stage() == 0:
        return not engine.bfloat16_enabled()
    # At ZeRO-1 in bfloat16 DeepSpeed keeps gradients elsewhere, with an optimiser of another kind.
    keeps_shards = hasattr(engine.optimizer, "averaged_gradients")
    return engine.zero_optimization_stage() < 3 and keeps_shards and not engine.optimizer.cpu_offload


def _silence(engine: Any) -> None:
    """Have DeepSpeed neither look for gradients that are not finite, nor compute their norm, nor clip.

    The attributes, not the configuration: that goes on saying what is done, whoever does it.
    """
    engine._config.gradient_clipping = 0.0
    if engine.zero_optimization_stage():
        engine.optimizer.clip_grad = 0.0
        engine.optimizer.check_grad_overflow = False
        engine.optimizer.compute_grad_norm = False


def _bare_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return torch's optimiser, which ZeRO wraps."""
    bare: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return bare


def _reduced_gradients(engine: Any) -> list[Tensor]:
    """Return the gradients that this process is about to update by: its shard's, or all without ZeRO."""
    if engine.zero_optimization_stage() == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    return [gradient for group in engine.optimizer.averaged_gradients.values() for gradient in group]


def _group_of_shards(engine: Any) -> dist.ProcessGroup | None:
    return engine.optimizer.dp_process_group if engine.zero_optimization_stage() else None


def _step_of_deepspeed(engine: Any) -> StepResult:
    """Let DeepSpeed look at the gradients of all ranks, and discard the step if need be."""
    skipped_before = engine.skipped_steps
    engine.step()
    norm, applied = engine.get_global_grad_norm(), engine.skipped_steps == skipped_before
    return StepResult(
        grad_norm=norm if isinstance(norm, Tensor) else torch.full((), norm, device=engine.device),
        applied=torch.full((), applied, dtype=torch.bool, device=engine.device),
    )
