"""Whether weights are numbers that a model can compute with: real, finite, of a floating type.

Place in the flow: every reader -> `widen` -> float32 weights. A model with one NaN answers every clip with NaN, so
such weights are refused where they are read, whatever they are read for.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from everest_ds.errors import UserError

# Types that hold weights as they are. Others (8-bit, quantised, integers) need scales that are kept elsewhere.
PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Last parts of names that are weights in every layout; counters and index tables have others.
WEIGHT_LEAVES = ("weight", "bias", "q_bias", "v_bias", "mask_token")
MAX_SHOWN = 3


def widen(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return every tensor as contiguous float32.

    Args:
        tensors: Weights by name.
        source: Where they are from, for errors.

    Raises:
        UserError: A tensor is complex, sparse, quantised or of 8 bits, a weight is not of a floating type, or a
            value is NaN, infinite, or too large for float32. The first such tensor is named.
    """
    for name, tensor in tensors.items():
        _require_plain(name, tensor, source)
    widened = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    require_finite(widened, source)
    return widened


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that hold NaN or infinite values; one pass over them.

    Raises:
        UserError: The first such tensor is named, with how many of its values and how many other tensors are bad.
    """
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if not bad:
        return
    first = tensors[bad[0]]
    num_nan = int(torch.isnan(first).sum())
    num_infinite = int(torch.isinf(first).sum())
    others = f", and {len(bad) - 1} more tensors hold such values" if len(bad) > 1 else ""
    raise UserError(
        f"{source}: {bad[0]} holds {num_nan} NaN and {num_infinite} infinite of {first.numel()} values{others}; "
        "a model cannot compute with them. Use a checkpoint from before the loss diverged, or get the file again"
    )


def _require_plain(name: str, tensor: Tensor, source: str) -> None:
    """Refuse one tensor that float32 does not hold."""
    fault = None
    if tensor.layout != torch.strided:
        fault = f"is sparse ({tensor.layout})"
    elif tensor.is_complex():
        fault = f"is complex ({_type(tensor)})"
    elif tensor.is_quantized:
        fault = f"is quantised ({_type(tensor)})"
    elif tensor.dtype not in PLAIN_DTYPES and (tensor.is_floating_point() or name.split(".")[-1] in WEIGHT_LEAVES):
        fault = f"is {_type(tensor)}"
    if fault:
        raise UserError(
            f"{source}: {name} {fault}; expected dense weights in {', '.join(map(_name, PLAIN_DTYPES))}. Convert "
            "them to one of these in the project that wrote them"
        )


def _type(tensor: Tensor) -> str:
    return _name(tensor.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
