"""Attention over packed tokens: one function, a ladder of backends.

Place in the flow: called by every block of the transformer. Axes: M tokens of all clips in one row, A heads,
K channels of a head, B clips, S tokens of each clip where all are equally long.

    varlen   torch's own variable-length FlashAttention     CUDA, float16 or bfloat16
    flash    the flash-attn package                         CUDA, float16 or bfloat16
    sdpa     scaled_dot_product_attention: one call when all clips are equally long, else one a length
             any device and dtype; the reference that the others are tested against

`auto` takes the first that is available. A backend that is asked for by name and is not available says why.
"""

import functools
import importlib
import importlib.util
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from everest_ds.errors import UserError, nearest_hint
from everest_ds.model.packing import Packing

_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_MAX_KERNEL_HEAD = 256
_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: As in the configuration.
        obstacle: Says why (device, dtype, channels of a head) is not supported, or returns None.
        run: Computes (q, k, v, packing) -> (M, A, K).
    """

    name: str
    obstacle: Callable[[torch.device, torch.dtype, int], str | None]
    run: Callable[[Tensor, Tensor, Tensor, Packing], Tensor]


def attention(q_MAK: Tensor, k_MAK: Tensor, v_MAK: Tensor, packing: Packing, *, backend: str = "auto") -> Tensor:
    """Attend within each clip of a packed row of tokens, scaled by 1 / sqrt(K).

    Args:
        q_MAK: Queries; keys and values alike.
        k_MAK: Keys.
        v_MAK: Values.
        packing: Where each clip starts and ends; clips without tokens are allowed.
        backend: A name of `BACKENDS`, or auto.

    Returns:
        (M, A, K) in the dtype of the inputs.

    Raises:
        UserError: The backend does not exist or is not available for these tensors, with the reason.
    """
    if q_MAK.shape[0] != packing.total:
        raise ValueError(f"packing is of {packing.total} tokens, got {q_MAK.shape[0]}")
    chosen = choose_backend(backend, q_MAK.device, q_MAK.dtype, q_MAK.shape[-1])
    return chosen.run(q_MAK, k_MAK, v_MAK, packing)


@functools.lru_cache(maxsize=64)
def choose_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """Return the backend of that name, or for auto the first that is available."""
    if name == "auto":
        return next(b for b in BACKENDS.values() if b.obstacle(device, dtype, head_dim) is None)
    if name not in BACKENDS:
        raise UserError(f"unknown attention backend {name!r}{nearest_hint(name, ['auto', *BACKENDS])}")
    obstacle = BACKENDS[name].obstacle(device, dtype, head_dim)
    if obstacle is not None:
        raise UserError(f"model.attention={name} is not available: {obstacle}; use model.attention=auto")
    return BACKENDS[name]


def _kernel_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return f"it needs compute capability 8.0, this GPU has {torch.cuda.get_device_capability(device)}"
    if dtype not in _KERNEL_DTYPES:
        return f"it computes in float16 or bfloat16 only, got {str(dtype).removeprefix('torch.')}"
    if head_dim > _MAX_KERNEL_HEAD or head_dim % 8:
        return f"a head must have a multiple of 8 and at most {_MAX_KERNEL_HEAD} channels, got {head_dim}"
    return None


def _varlen_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen; it came with 2.10"
    return _kernel_obstacle(device, dtype, head_dim)


def _flash_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "the flash-attn package is not installed; pip install flash-attn"
    obstacle = _kernel_obstacle(device, dtype, head_dim)
    if obstacle is None:
        try:
            _flash_function()
        except (ImportError, AttributeError) as error:
            return f"the flash-attn package does not load: {error}"
    return obstacle


def _flash_function() -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = importlib.import_module("flash_attn").flash_attn_varlen_func
    return function


def _run_varlen(q_MAK: Tensor, k_MAK: Tensor, v_MAK: Tensor, packing: Packing) -> Tensor:
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return _run_packed(varlen_attn, q_MAK, k_MAK, v_MAK, packing=packing)


def _run_flash(q_MAK: Tensor, k_MAK: Tensor, v_MAK: Tensor, packing: Packing) -> Tensor:
    return _run_packed(_flash_function(), q_MAK, k_MAK, v_MAK, packing=packing)


def _run_packed(function: Callable[..., Tensor], *qkv_MAK: Tensor, packing: Packing) -> Tensor:
    # Positional: the keyword names moved between torch versions.
    return function(*qkv_MAK, packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen)


def _run_sdpa(q_MAK: Tensor, k_MAK: Tensor, v_MAK: Tensor, packing: Packing) -> Tensor:
    lengths = packing.lengths
    if len(set(lengths)) <= 1:
        return _equal_lengths(q_MAK, k_MAK, v_MAK, num_clips=len(lengths))
    clips_of_length: dict[int, list[int]] = defaultdict(list)
    for clip, length in enumerate(lengths):
        clips_of_length[length].append(clip)
    queries, keys, values = (x.split(lengths) for x in (q_MAK, k_MAK, v_MAK))
    out: list[Tensor] = list(queries)
    for length, clips in clips_of_length.items():
        if length == 0:
            continue
        group = [torch.cat([x[clip] for clip in clips]) for x in (queries, keys, values)]
        attended = _equal_lengths(*group, num_clips=len(clips))
        for clip, rows in zip(clips, attended.split(length), strict=True):
            out[clip] = rows
    return torch.cat(out)


def _equal_lengths(q_MAK: Tensor, k_MAK: Tensor, v_MAK: Tensor, *, num_clips: int) -> Tensor:
    q, k, v = (rearrange(x, "(b s) a k -> b a s k", b=num_clips) for x in (q_MAK, k_MAK, v_MAK))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b a s k -> (b s) a k")


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("varlen", _varlen_obstacle, _run_varlen),
        Backend("flash", _flash_obstacle, _run_flash),
        Backend("sdpa", lambda *_: None, _run_sdpa),
    )
}
