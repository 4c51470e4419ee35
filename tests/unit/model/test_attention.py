from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from everest_ds.errors import UserError
from everest_ds.model.attention import BACKENDS, attention, choose_backend
from everest_ds.model.packing import Packing

LENGTHS = [[4, 4, 4], [1, 7, 3, 7], [0, 5, 0, 2], [9], [1]]
# Against float64 plain softmax; measured 4e-7.
FLOAT32_ATOL = 2e-6
# Backends against each other in bfloat16: outputs about 1, 8 bits of mantissa, two roundings.
BFLOAT16_ATOL = 2e-2


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The dense oracle: one softmax over everything, other clips masked out, in float64."""
    clip_M = torch.tensor([c for c, length in enumerate(lengths) for _ in range(length)])
    scores = torch.einsum("mak,nak->amn", q.double(), k.double()) / math.sqrt(q.shape[-1])
    scores.masked_fill_(clip_M[:, None] != clip_M[None, :], -math.inf)
    return torch.einsum("amn,nak->mak", scores.softmax(dim=-1), v.double())


def random_qkv(total: int, head_dim: int, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(total)
    return [torch.randn(total, 2, head_dim, generator=generator).to(device) for _ in range(3)]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_sdpa_equals_the_dense_oracle_forward_and_backward(lengths: list[int]) -> None:
    packing = Packing.from_lengths(lengths, torch.device("cpu"))
    inputs = [x.requires_grad_() for x in random_qkv(sum(lengths), 8)]
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*inputs, packing, backend="sdpa")
    expected = plain_attention(*copies, lengths)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=FLOAT32_ATOL)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, copy in zip(inputs, copies, strict=True):
        torch.testing.assert_close(x.grad, copy.grad, rtol=0, atol=5 * FLOAT32_ATOL)


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
    base = [x.bfloat16() for x in random_qkv(sum(lengths), head_dim, "cuda")]
    results = {}
    for backend in pair:
        inputs = [x.clone().requires_grad_() for x in base]
        out = attention(*inputs, packing, backend=backend)
        out.float().square().sum().backward()
        results[backend] = [out, *(x.grad for x in inputs)]
    for one, other in zip(*results.values(), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=BFLOAT16_ATOL)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("lengths", [*LENGTHS[:-1], [156, 156], [471, 3, 0, 1, 1568]])  # [1] asks the driver
def test_torchs_kernel_takes_what_it_is_handed(
    lengths: list[int], head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On fake tensors of a GPU that is not there: names, shapes and types of this torch's varlen_attn."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *given: (9, 0))
    with FakeTensorMode():
        packing = Packing.from_lengths(lengths, torch.device("cuda"))
        q, k, v = (
            torch.empty(sum(lengths), 6, head_dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for _ in range(3)
        )
        out = attention(q, k, v, packing, backend="varlen")
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")
    assert out.requires_grad


def test_auto_takes_the_first_that_serves() -> None:
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 64).name == "sdpa"
    on_gpu = choose_backend("auto", torch.device("cuda"), torch.bfloat16, 64).name
    first = next(b.name for b in BACKENDS.values() if not b.obstacle(torch.device("cuda"), torch.bfloat16, 64))
    assert on_gpu == first
    assert choose_backend("auto", torch.device("cuda"), torch.float32, 64).name == "sdpa"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_dim", "message"),
    [
        ("varlen", "cpu", torch.bfloat16, 64, "needs a CUDA device, got cpu"),
        ("varlen", "cuda", torch.float32, 64, "float16 or bfloat16 only, got float32"),
        ("varlen", "cuda", torch.bfloat16, 36, "multiple of 8"),
        ("flsh", "cpu", torch.float32, 64, "did you mean 'flash'"),
    ],
)
def test_backend_that_cannot_serve_says_why(
    name: str, device: str, dtype: torch.dtype, head_dim: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_backend(name, torch.device(device), dtype, head_dim)


def test_packing_of_another_row_is_refused() -> None:
    with pytest.raises(ValueError, match="packing is of 4 tokens, got 5"):
        attention(*random_qkv(5, 8), Packing.from_lengths([4], torch.device("cpu")))
