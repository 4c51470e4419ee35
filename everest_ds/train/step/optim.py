"""Parameter groups, and the learning rate as a pure function of the step."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from everest_ds.config import BatchConfig, OptimConfig

# Parameters without weight decay besides biases and norms (official `no_weight_decay`).
NO_DECAY_NAMES = ("mask_token",)
RATE_RTOL = 1e-9


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Split the trainable parameters by weight decay and learning rate.

    Vectors (biases, norms) and the mask token have no weight decay. With layer decay, the embedding is layer 0,
    block i layer i + 1, and everything after the blocks layer depth + 1, whose scale is 1. Each layer's scale is
    ``layer_decay`` times that of the next layer. Call this before ZeRO-3 partitions the parameters, because the
    rule looks at their shapes.

    Args:
        model: A model, or a task whose model's names begin with ``model.``.
        weight_decay: Weight decay of matrices.
        layer_decay: Learning rate of a layer as a share of the next layer's, in (0, 1]; 1 needs no blocks.

    Returns:
        One group for each pair of ``lr_scale`` and ``weight_decay`` that occurs, the largest scale first. So the
        first group's learning rate is the schedule's own if a head is trained.

    Raises:
        ValueError: Layer decay for a model without `blocks.0`, such as an autoencoder.

    Source: official code, `get_parameter_groups`, `get_num_layer_for_vit` (golden optim_schedule.json).
    """
    scale_of = _layer_scales([name for name, _ in model.named_parameters()], layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_plain = parameter.ndim == 1 or name.endswith(".bias") or name.endswith(NO_DECAY_NAMES)
        key = (scale_of[name], 0.0 if is_plain else weight_decay)
        groups.setdefault(key, []).append(parameter)
    order = sorted(groups, key=lambda key: (-key[0], key[1]))
    return [{"params": groups[scale, decay], "weight_decay": decay, "lr_scale": scale} for scale, decay in order]


def _layer_scales(names: Sequence[str], layer_decay: float) -> dict[str, float]:
    """Return each parameter's share of the learning rate."""
    if layer_decay == 1:
        return dict.fromkeys(names, 1.0)
    blocks = {name: re.match(r"(?:model\.)?blocks\.(\d+)\.", name) for name in names}
    depth = 1 + max((int(match[1]) for match in blocks.values() if match), default=-1)
    if depth == 0:
        raise ValueError(f"layer_decay={layer_decay} needs a model with blocks.0, such as a classifier")

    def layer_of(name: str) -> int:
        match = blocks[name]
        if match:
            return int(match[1]) + 1
        return 0 if name.removeprefix("model.").startswith("patch_embed.") else depth + 1

    return {name: layer_decay ** (depth + 1 - layer_of(name)) for name in names}


def describe_groups(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return lr_scale, weight_decay, num_tensors and num_parameters of each group, for a log."""
    return [
        {
            "lr_scale": float(group.get("lr_scale", 1.0)),
            "weight_decay": float(group["weight_decay"]),
            "num_tensors": len(group["params"]),
            "num_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in group["params"]),
        }
        for group in groups
    ]


def require_scaled_rates(groups: Sequence[Mapping[str, Any]], rate: float) -> None:
    """Check that every group of an optimiser has the schedule's rate times its own scale."""
    for number, group in enumerate(groups):
        expected = rate * group.get("lr_scale", 1.0)
        if not math.isclose(group["lr"], expected, rel_tol=RATE_RTOL):
            raise ValueError(f"parameter group {number} has learning rate {group['lr']}, expected {expected}")


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """Return torch's fused AdamW: one pass over weights and moments, whose step `train.step.updater` can skip."""
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, config: OptimConfig, batch: BatchConfig, steps_per_epoch: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to the minimum.

    Rates scale with global_size / 256. The first warm-up step has warmup_lr and the last warm-up step the peak. The
    next step has the peak again, and one more step after the end of the schedule would have min_lr.

    Source: paper Appendix A (linear scaling); official `cosine_scheduler` (golden optim_schedule.json).
    Differs from the official code: warmup_lr takes effect (there it is parsed, scaled and not used).
    """
    scale = batch.global_size / 256
    peak, floor, start = config.base_lr * scale, config.min_lr * scale, config.warmup_lr * scale
    warmup_steps = int(config.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return start + (peak - start) * step / max(warmup_steps - 1, 1)
    decay_steps = max(config.epochs * steps_per_epoch - warmup_steps, 1)
    progress = (step - warmup_steps) / decay_steps
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))
