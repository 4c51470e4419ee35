from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from everest_ds.errors import UserError
from everest_ds.model import attention as module
from everest_ds.model.attention import BACKENDS, attention, choose_backend, dense_kernels
from everest_ds.model.packing import Packing

LENGTHS = [[4, 4, 4], [1, 7, 3, 7], [0, 5, 0, 2], [9], [1]]
# Against plain softmax in float64; measured 4e-7.
FLOAT32_ATOL = 2e-6
# Between backends in bfloat16: outputs of about 1, 8 bits of mantissa, two roundings.
BFLOAT16_ATOL = 2e-2


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The dense oracle: one float64 softmax over all tokens, with other clips masked."""
    clip_M = torch.tensor([c for c, length in enumerate(lengths) for _ in range(length)])
    scores = torch.einsum("mak,nak->amn", q.double(), k.double()) / math.sqrt(q.shape[-1])
    scores.masked_fill_(clip_M[:, None] != clip_M[None, :], -math.inf)
    return torch.einsum("amn,nak->mak", scores.softmax(dim=-1), v.double())


def random_qkv(total: int, head_dim: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(total)
    return torch.randn(total, 3, 2, head_dim, generator=generator).to(device)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_sdpa_equals_the_dense_oracle_forward_and_backward(lengths: list[int]) -> None:
    packing = Packing.from_lengths(lengths, torch.device("cpu"))
    qkv = random_qkv(sum(lengths), 8).requires_grad_()
    copy = qkv.detach().clone().requires_grad_()
    out = attention(qkv, packing, backend="sdpa")
    expected = plain_attention(*copy.unbind(1), lengths)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=FLOAT32_ATOL)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(qkv.grad, copy.grad, rtol=0, atol=5 * FLOAT32_ATOL)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("pair", list(itertools.combinations(BACKENDS, 2)), ids="-".join)
def test_gpu_backends_agree_forward_and_backward(pair: tuple[str, str], lengths: list[int], head_dim: int) -> None:
    device = torch.device("cuda")
    for name in pair:
        obstacle = BACKENDS[name].obstacle(device, torch.bfloat16, head_dim)
        if obstacle:
            pytest.skip(obstacle)
    packing = Packing.from_lengths(lengths, device)
    base = random_qkv(sum(lengths), head_dim, "cuda").bfloat16()
    results = {}
    for backend in pair:
        qkv = base.clone().requires_grad_()
        out = attention(qkv, packing, backend=backend)
        out.float().square().sum().backward()
        results[backend] = [out, qkv.grad]
    for one, other in zip(*results.values(), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=BFLOAT16_ATOL)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("lengths", [*LENGTHS[:-1], [156, 156], [471, 3, 0, 1, 1568]])  # [1] queries the driver
def test_torchs_kernel_takes_what_it_is_handed(
    lengths: list[int], head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake CUDA tensors check argument names, shapes and dtypes against this torch's varlen_attn."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *given: (9, 0))
    with FakeTensorMode():
        packing = Packing.from_lengths(lengths, torch.device("cuda"))
        shape = (sum(lengths), 3, 6, head_dim)
        qkv = torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        out = attention(qkv, packing, backend="varlen")
    assert (out.shape, out.dtype, out.device.type) == (qkv[:, 0].shape, torch.bfloat16, "cuda")
    assert out.requires_grad


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choose backends as for a Hopper GPU, of compute capability 9.0."""
    monkeypatch.setattr(module, "_capability", lambda device: (9, 0))
    module.choose_backend.cache_clear()
    module._activate.cache_clear()
    yield
    module.choose_backend.cache_clear()
    module._activate.cache_clear()


@pytest.mark.usefixtures("on_hopper")
def test_auto_is_dense_where_clips_are_equally_long_and_else_the_first_that_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    def note(name: str, qkv: torch.Tensor, packing: Packing) -> torch.Tensor:
        seen.append(name)
        return qkv[:, 0]

    for name in ("sdpa", "varlen"):
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], run=partial(note, name)))
    chosen = choose_backend("auto", GPU, torch.bfloat16, 64)
    for lengths in ([4, 4, 4], [4, 3], [7], [0, 0], [0, 5]):
        chosen.run(random_qkv(sum(lengths), 8), Packing.from_lengths(lengths, CPU))
    assert seen == ["sdpa", "varlen", "sdpa", "sdpa", "varlen"]
    assert chosen.name == "sdpa, varlen where lengths differ"
    for device, dtype in ((CPU, torch.float32), (CPU, torch.bfloat16), (GPU, torch.float32)):
        assert choose_backend("auto", device, dtype, 64).name == "sdpa"
    assert choose_backend("auto", GPU, torch.bfloat16, 36).name == "sdpa"


def test_dense_call_tries_cudnn_first_on_hopper_and_flash_first_on_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    firsts = {}
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(module, "_capability", lambda device, found=capability: found)
        kernels = [kernel.name for kernel in dense_kernels(GPU)]
        firsts[capability] = kernels[0]
        assert sorted(kernels) == ["CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "MATH"]
        assert kernels[-1] == "MATH"
    flash, cudnn = "FLASH_ATTENTION", "CUDNN_ATTENTION"
    assert firsts == {(8, 0): flash, (8, 9): flash, (9, 0): cudnn, (10, 0): cudnn}


@pytest.mark.parametrize("lengths", [[4, 4, 4], [156, 156], [9]])
def test_dense_call_copies_nothing_on_its_way_into_the_kernel_and_out(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses fake CUDA tensors and the kernel itself, because SDPA would query the driver."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    monkeypatch.setattr(module, "_dense", lambda q, k, v: kernel(q, k, v)[0])
    copies: list[str] = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(word in str(func) for word in ("copy", "clone", "contiguous", "cat", "stack")):
                copies.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Listen():
        packing = Packing.from_lengths(lengths, GPU)
        qkv = torch.empty((sum(lengths), 3, 6, 64), dtype=torch.bfloat16, device="cuda")
        out = attention(qkv, packing, backend="sdpa")
    assert (out.shape, out.dtype, out.device.type) == (qkv[:, 0].shape, torch.bfloat16, "cuda")
    assert copies == []


@pytest.mark.usefixtures("on_hopper")
def test_newer_kernels_are_activated_once_and_run_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    activated: list[str] = []
    monkeypatch.setattr(module, "activate_flash_attention_impl", activated.append)
    for head_dim in (64, 80):
        assert choose_backend("fa3", GPU, torch.bfloat16, head_dim).run is BACKENDS["varlen"].run
    assert activated == ["FA3"]

    def refuse(name: str) -> None:
        raise RuntimeError(f"Module does not expose {name} kernels")

    monkeypatch.setattr(module, "activate_flash_attention_impl", refuse)
    with pytest.raises(UserError, match="fa4 is not available: torch cannot activate FA4: Module does not expose"):
        choose_backend("fa4", GPU, torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_dim", "message"),
    [
        ("varlen", "cpu", torch.bfloat16, 64, "needs a CUDA device, got cpu"),
        ("varlen", "cuda", torch.float32, 64, "float16 and bfloat16 only, got float32"),
        ("varlen", "cuda", torch.bfloat16, 36, "multiple of 8"),
        ("fa3", "cuda", torch.bfloat16, 64, "module flash_attn_interface is not installed"),
        ("fa4", "cuda", torch.bfloat16, 64, r"module flash_attn\.cute\.interface is not installed"),
        ("flsh", "cpu", torch.float32, 64, "did you mean 'flash'"),
    ],
)
def test_backend_that_cannot_serve_says_why(
    name: str, device: str, dtype: torch.dtype, head_dim: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_backend(name, torch.device(device), dtype, head_dim)


def test_packing_of_another_row_is_refused() -> None:
    with pytest.raises(ValueError, match="packing has 4 tokens, got 5"):
        attention(random_qkv(5, 8), Packing.from_lengths([4], torch.device("cpu")))
