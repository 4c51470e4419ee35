"""Parameter groups and the learning rate, the latter a pure function of the step."""

import math

import torch
from torch import nn

from everest_ds.config import BatchConfig, OptimConfig

# Parameters besides biases and norms that have no weight decay (official `no_weight_decay`).
NO_DECAY_NAMES = ("mask_token",)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters into those with and those without weight decay.

    Vectors (biases, norms) and the mask token have none. Call before ZeRO-3 partitions the parameters: the rule
    looks at their shapes.

    Source: official code, `get_parameter_groups` (golden optim_schedule.json).
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_plain = parameter.ndim == 1 or name.endswith(".bias") or name.endswith(NO_DECAY_NAMES)
        (no_decay if is_plain else decay).append(parameter)
    return [
        {"params": no_decay, "weight_decay": 0.0},
        {"params": decay, "weight_decay": weight_decay},
    ]


def make_optimizer(groups: list[dict[str, object]], config: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """Return torch's AdamW, fused on a GPU; DeepSpeed compiles nothing for it."""
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        fused=device.type == "cuda",
    )


def learning_rate(step: int, config: OptimConfig, batch: BatchConfig, steps_per_epoch: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to the minimum.

    Rates scale with global_size / 256. The first warm-up step has warmup_lr and the last one the peak; the first
    step after them has the peak again, and the step after the last one would have min_lr.

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
