"""The optimiser step: gradients are clipped by their global norm; the step is skipped where one is not finite.

Place in the flow: backward -> gradients, reduced by DeepSpeed -> `Updater.step` -> weights.

At ZeRO-2, and with float32 weights also at ZeRO-0 and 1, the host never waits for the device here. The norm stays
on the device, and AdamW's fused kernel gets what torch's gradient scaler gives it: a divisor of the gradients, and
whether to skip the update. DeepSpeed would wait for the device several times a step. In all other cases (ZeRO-3, an
offloaded optimiser, ZeRO-0 and 1 in bfloat16) it still does; the result of a step is the same.
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
    """Result of an optimiser step, as scalars on the device (no synchronisation).

    Attributes:
        grad_norm: Global gradient norm before clipping; not finite where the step was skipped.
        applied: False where a gradient was not finite, so that no weight was changed; bool.
    """

    grad_norm: Tensor
    applied: Tensor


class Updater:
    """Takes the optimiser steps of an engine whose checkpoint is loaded.

    DeepSpeed's checkpoints bring the clipping of the run that wrote them; here it becomes this run's.

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
        """Update the weights where accumulation is complete and every gradient finite; None before that."""
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
    """Return the norm over all gradients of all ranks, a float32 scalar on the device.

    Args:
        gradients: This rank's.
        group: The ranks that hold other parts; None where each rank holds all gradients.
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
    """Stop DeepSpeed from checking, measuring and clipping gradients itself; its configuration still names them."""
    engine._config.gradient_clipping = 0.0
    if engine.zero_optimization_stage():
        engine.optimizer.clip_grad = 0.0
        engine.optimizer.check_grad_overflow = False
        engine.optimizer.compute_grad_norm = False


def _bare_optimizer(engine: Any) -> torch.optim.Optimizer:
    bare: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return bare


def _reduced_gradients(engine: Any) -> list[Tensor]:
    """Return the gradients that this rank updates by: its shard's, or all without ZeRO."""
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
