"""Activation checkpointing: what of a block is computed again in backward instead of being kept.

Place in the flow: `run_blocks` runs every block through `recomputed` where a run checkpoints. Kept of a block is
its input, and on request also what attention made of it: the one operation whose cost grows with the square of a
clip's tokens, for one more tensor of the input's size.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# By name: torch's varlen and flash-attn register theirs when they are imported. SDPA's fallback, which torch takes
# where no fused kernel serves, is made of matrix products and not listed: it is computed again.
ATTENTION_OPERATORS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
    }
)


def recomputed(function: Callable[..., Tensor], *args: object, attention_too: bool) -> Tensor:
    """Return ``function(*args)``, keeping only its inputs, and compute the rest again in backward.

    Args:
        function: A block; it runs a second time in backward.
        args: Its arguments, tensors and others.
        attention_too: Compute attention again like the rest; else its output and the log-sum-exp of each row and
            head are kept.
    """
    if attention_too:
        return checkpoint(function, *args, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def _keep_attention(context: Any, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = operator.name() in ATTENTION_OPERATORS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
