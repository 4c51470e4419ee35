"""Attention over packed tokens: one function, several backends.

Place in the flow: called by every block of the transformer. Axes: M tokens of all clips in one row, A heads,
K channels of a head, B clips, S tokens of each clip where all are equally long; 3 for query, key and value.

    sdpa     scaled_dot_product_attention: one dense call if all clips are equally long, else one call per length;
             any device and dtype; the reference that the others are tested against
    varlen   torch's own variable-length FlashAttention     CUDA, float16 or bfloat16
    flash    the flash-attn package                         CUDA, float16 or bfloat16
    fa3      varlen with FlashAttention-3's kernels         CUDA, compute capability 9.0, and its package
    fa4      varlen with FlashAttention-4's kernels         CUDA, compute capability 9.0 or 10.0, and its package

`auto` uses sdpa where all clips are equally long, and otherwise the first of varlen, flash and sdpa that is
available. On one H200 the dense call took 0.5 to 0.7 of varlen's time (docs/results.md). fa3 and fa4 have not been
measured, so `auto` never picks them. Naming a backend that is not available is an error that gives the reason.
"""

import functools
import importlib
import importlib.util
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from everest_ds.errors import UserError, nearest_hint
from everest_ds.model.packing import Packing

Capability = tuple[int, int]

_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_MAX_KERNEL_HEAD = 256
_AMPERE, _HOPPER, _BLACKWELL = (8, 0), (9, 0), (10, 0)
_DIFFERENT_LENGTHS = ("varlen", "flash", "sdpa")


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: As in the configuration; for auto, which backend is used when.
        obstacle: Takes (device, dtype, channels of a head) and returns why they are not supported, or None.
        run: Takes qkv (M, 3, A, K) and the packing, returns (M, A, K).
    """

    name: str
    obstacle: Callable[[torch.device, torch.dtype, int], str | None]
    run: Callable[[Tensor, Packing], Tensor]


def attention(qkv_M3AK: Tensor, packing: Packing, *, backend: str = "auto") -> Tensor:
    """Attend within each clip of a packed row of tokens, scaled by 1 / sqrt(K).

    Args:
        qkv_M3AK: Queries, keys and values.
        packing: Where each clip starts and ends; clips without tokens are allowed.
        backend: A name of `BACKENDS`, or auto.

    Returns:
        (M, A, K) in the dtype of the inputs.

    Raises:
        UserError: The backend does not exist, or is not available for these tensors; the message gives the reason.
    """
    if qkv_M3AK.shape[0] != packing.total:
        raise ValueError(f"packing has {packing.total} tokens, got {qkv_M3AK.shape[0]}")
    chosen = choose_backend(backend, qkv_M3AK.device, qkv_M3AK.dtype, qkv_M3AK.shape[-1])
    return chosen.run(qkv_M3AK, packing)


@functools.lru_cache(maxsize=64)
def choose_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """Return the named backend; for auto, one that switches to another where lengths differ."""
    if name == "auto":
        ladder = (BACKENDS[other] for other in _DIFFERENT_LENGTHS)
        return _by_lengths(next(one for one in ladder if one.obstacle(device, dtype, head_dim) is None))
    if name not in BACKENDS:
        raise UserError(f"unknown attention backend {name!r}{nearest_hint(name, ['auto', *BACKENDS])}")
    obstacle = BACKENDS[name].obstacle(device, dtype, head_dim)
    if obstacle is None and name in ("fa3", "fa4"):
        obstacle = _activate(name.upper())
    if obstacle is not None:
        raise UserError(f"model.attention={name} is not available: {obstacle}; use model.attention=auto")
    return BACKENDS[name]


def dense_kernels(device: torch.device) -> list[SDPBackend]:
    """Return the kernels that a dense call on a GPU may use, the fastest first.

    cuDNN's is the fastest on Hopper (measured on an H200), FlashAttention-2 on Ampere. torch skips a kernel that
    does not support the tensors.
    """
    fastest = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if _capability(device) < _HOPPER:
        fastest.reverse()
    return [*fastest, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _by_lengths(different: Backend) -> Backend:
    """Return a backend that uses sdpa for clips of equal length and ``different`` for others."""
    dense = BACKENDS["sdpa"]
    if different is dense:
        return dense

    def run(qkv_M3AK: Tensor, packing: Packing) -> Tensor:
        return (dense if packing.is_even else different).run(qkv_M3AK, packing)

    return Backend(f"sdpa, {different.name} where lengths differ", lambda *_: None, run)


@functools.cache
def _capability(device: torch.device) -> Capability:
    """Return a GPU's compute capability; Ampere's if there is no GPU."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else _AMPERE


def _kernel_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    if _capability(device) < _AMPERE:
        return f"it needs compute capability 8.0, this GPU has {_capability(device)}"
    if dtype not in _KERNEL_DTYPES:
        return f"it supports float16 and bfloat16 only, got {str(dtype).removeprefix('torch.')}"
    if head_dim > _MAX_KERNEL_HEAD or head_dim % 8:
        return f"the channels of a head must be a multiple of 8 and at most {_MAX_KERNEL_HEAD}, got {head_dim}"
    return None


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


def _newer_obstacle(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    package: str,
    capabilities: tuple[Capability, ...],
) -> str | None:
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package is missing
        found = False
    if not found:
        return f"the module {package} is not installed; install the FlashAttention package that has it"
    if device.type == "cuda" and torch.cuda.is_available() and _capability(device) not in capabilities:
        known = " or ".join(f"{major}.{minor}" for major, minor in capabilities)
        return f"it needs compute capability {known}, this GPU has {_capability(device)}"
    return _kernel_obstacle(device, dtype, head_dim)


@functools.cache
def _activate(implementation: str) -> str | None:
    """Replace torch's flash and varlen kernels until the process ends; return why that failed, or None."""
    try:
        activate_flash_attention_impl(implementation)
    except (ImportError, RuntimeError, ValueError) as error:
        return f"torch cannot activate {implementation}: {error}"
    return None


def _flash_function() -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = importlib.import_module("flash_attn").flash_attn_varlen_func
    return function


def _run_varlen(qkv_M3AK: Tensor, packing: Packing) -> Tensor:
    return _run_packed(importlib.import_module("torch.nn.attention.varlen").varlen_attn, qkv_M3AK, packing)


def _run_flash(qkv_M3AK: Tensor, packing: Packing) -> Tensor:
    return _run_packed(_flash_function(), qkv_M3AK, packing)


def _run_packed(function: Callable[..., Tensor], qkv_M3AK: Tensor, packing: Packing) -> Tensor:
    # Positional, because the keyword names differ between torch versions. Split on a middle axis: backward then
    # writes each of the three gradients once, at its final place.
    starts, longest = packing.cu_seqlens, packing.max_seqlen
    return function(*qkv_M3AK.unbind(1), starts, starts, longest, longest)


def _run_sdpa(qkv_M3AK: Tensor, packing: Packing) -> Tensor:
    lengths = packing.lengths
    if packing.is_even:
        return _equal_lengths(qkv_M3AK, num_clips=len(lengths))
    clips_of_length: dict[int, list[int]] = defaultdict(list)
    for clip, length in enumerate(lengths):
        clips_of_length[length].append(clip)
    rows = qkv_M3AK.split(lengths)
    out: list[Tensor] = list(rows)
    for length, clips in clips_of_length.items():
        attended = _equal_lengths(torch.cat([rows[clip] for clip in clips]), num_clips=len(clips))
        for clip, part in zip(clips, attended.split(length) if length else [attended] * len(clips), strict=True):
            out[clip] = part
    return torch.cat(out)


def _equal_lengths(qkv_M3AK: Tensor, *, num_clips: int) -> Tensor:
    if not len(qkv_M3AK):
        return qkv_M3AK[:, 0]
    qkv_BS3AK = qkv_M3AK.view(num_clips, -1, *qkv_M3AK.shape[1:])
    # Split on a middle axis: backward then writes each of the three gradients once, at its final place.
    q_BASK, k_BASK, v_BASK = (x_BSAK.transpose(1, 2) for x_BSAK in qkv_BS3AK.unbind(2))
    return _dense(q_BASK, k_BASK, v_BASK).transpose(1, 2).flatten(0, 1)


def _dense(q_BASK: Tensor, k_BASK: Tensor, v_BASK: Tensor) -> Tensor:
    if not q_BASK.is_cuda:
        return F.scaled_dot_product_attention(q_BASK, k_BASK, v_BASK)
    with sdpa_kernel(dense_kernels(q_BASK.device), set_priority=True):
        return F.scaled_dot_product_attention(q_BASK, k_BASK, v_BASK)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("sdpa", lambda *_: None, _run_sdpa),
        Backend("varlen", _kernel_obstacle, _run_varlen),
        Backend("flash", _flash_obstacle, _run_flash),
        Backend(
            "fa3",
            functools.partial(_newer_obstacle, package="flash_attn_interface", capabilities=(_HOPPER,)),
            _run_varlen,
        ),
        Backend(
            "fa4",
            functools.partial(
                _newer_obstacle, package="flash_attn.cute.interface", capabilities=(_HOPPER, _BLACKWELL)
            ),
            _run_varlen,
        ),
    )
}
