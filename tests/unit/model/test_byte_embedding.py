from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from everest_ds.benchmark.workbench import moving_clips
from everest_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD
from everest_ds.model import tubelets
from everest_ds.model.encoder import EncoderOptions, TokenEncoder
from everest_ds.model.importance import rero_importance
from everest_ds.model.selection import rank_by_importance
from everest_ds.model.sizes import get_size
from everest_ds.model.tubelets import (
    TubeletEmbedding,
    embed_bytes,
    exact_matmul,
    has_exact_matmul,
    standardise,
)
from everest_ds.tokens import TokenGrid

KERNEL = (2, 16, 16)
GRID = TokenGrid(time=4, rows=7, cols=7)
CPU = torch.device("cpu")
WEIGHT_DTYPES = [torch.float32, torch.bfloat16]
# Of embeddings up to 4; measured 8e-6 here and 1.2e-5 on real video, as a convolution in float32; in bfloat16 2e-2.
EMBEDDING_ATOL = 3e-5
# Measured 9e-7 here and 7e-6 on real video; a convolution in float32 has 1.6e-6 and 1.7e-5.
IMPORTANCE_RTOL = 5e-6


def make_clips(device: torch.device = CPU) -> torch.Tensor:
    return moving_clips(3, 8, 112, torch.Generator(device).manual_seed(0))


def make_kernel(dtype: torch.dtype, device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    proj = TubeletEmbedding(width=192, tubelet_size=2, patch_size=16).proj
    assert proj.bias is not None
    return proj.weight.detach().to(device, dtype), proj.bias.detach().to(device, dtype)


def embed_in_float64(clips: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    clips, weight, bias = clips.cpu(), weight.cpu(), bias.cpu()
    return F.conv3d((clips.double() / 255 - mean) / std, weight.double(), bias.double(), stride=KERNEL)


def change_of(x: torch.Tensor) -> torch.Tensor:
    """The l2 distance of each token from the one a step before, for steps from the second on, (B, N')."""
    x_BTJD = x.flatten(3).permute(0, 2, 3, 1)
    return (x_BTJD[:, 1:] - x_BTJD[:, :-1]).norm(dim=-1).flatten(1)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_embeddings_are_those_of_a_convolution_in_float64(dtype: torch.dtype) -> None:
    clips, (weight, bias) = make_clips(), make_kernel(dtype)
    expected = embed_in_float64(clips, weight, bias)
    found = embed_bytes(clips, weight, bias)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=EMBEDDING_ATOL)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_change_is_at_least_as_exact_as_that_of_a_convolution_in_float32(dtype: torch.dtype) -> None:
    clips, (weight, bias) = make_clips(), make_kernel(dtype)
    expected = change_of(embed_in_float64(clips, weight, bias))
    moves = expected > 1e-9
    assert 0.2 < moves.double().mean() < 0.9  # some tokens change, others stand still
    errors = {}
    for name, x in {
        "bytes": embed_bytes(clips, weight, bias),
        "float32": F.conv3d(standardise(clips), weight.float(), bias.float(), stride=KERNEL),
    }.items():
        change = change_of(x.double())
        assert (change[~moves] == 0).all(), f"{name}: a token that stands still has not changed"
        errors[name] = float(((change - expected) / expected)[moves].abs().max())
    assert errors["bytes"] < IMPORTANCE_RTOL
    assert errors["bytes"] < 2 * errors["float32"]


def test_products_are_exact_where_their_sums_are() -> None:
    x_MP = torch.tensor([[-128.0, 127.0, 1.0], [0.0, 3.0, 127.0]]).bfloat16()
    weight_DP = torch.tensor([[1 + 2**-7, -(2.0**-9), 2.0**-14]]).bfloat16()
    expected = [[-128 * (1 + 2**-7) - 127 * 2**-9 + 2**-14], [-3 * 2**-9 + 127 * 2**-14]]
    assert exact_matmul(x_MP, weight_DP).tolist() == expected


@pytest.fixture
def exact_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that passes for a device that gains by it."""
    monkeypatch.setattr(tubelets, "has_exact_matmul", lambda device: True)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_encoder_ranks_alike_either_way(
    dtype: torch.dtype, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    encoder = TokenEncoder(get_size("nano"), GRID).to(dtype)
    (group,) = encoder.group(make_clips())
    before = encoder.rank(group)
    request.getfixturevalue("exact_cpu")
    monkeypatch.setattr("everest_ds.model.encoder.standardise", None)  # it is not standardised besides
    after = encoder.rank(group)
    assert not torch.equal(after, before)  # another way
    torch.testing.assert_close(after, before, rtol=3 * IMPORTANCE_RTOL, atol=0)
    count = GRID.num_tokens * 3 // 10
    chosen = [rank_by_importance(i)[:, :count].sort(dim=1).values for i in (before, after)]
    assert torch.equal(*chosen)


@pytest.mark.usefixtures("exact_cpu")
def test_only_bytes_and_one_layer_go_this_way() -> None:
    clips = make_clips()
    one = TubeletEmbedding(width=8, tubelet_size=2, patch_size=16)
    two = TubeletEmbedding(width=8, tubelet_size=2, patch_size=16, num_layers=2)
    assert one.embeds_bytes(clips)
    assert not one.embeds_bytes(clips.float() / 255)
    assert not two.embeds_bytes(clips)


def test_cpu_convolves_in_float32() -> None:
    assert not has_exact_matmul(CPU)
    encoder = TokenEncoder(get_size("nano"), GRID, EncoderOptions())
    (group,) = encoder.group(make_clips())
    x_BND = encoder.patch_embed(standardise(group.clips_BCTHW))
    assert torch.equal(encoder.rank(group), rero_importance(x_BND, GRID))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_gpu_embeds_and_ranks_as_float64_does(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    assert has_exact_matmul(device)
    clips, (weight, bias) = make_clips(device), make_kernel(dtype, device)
    expected, found = embed_in_float64(clips, weight, bias), embed_bytes(clips, weight, bias).cpu().double()
    torch.testing.assert_close(found, expected, rtol=0, atol=EMBEDDING_ATOL)
    moves = change_of(expected) > 1e-9
    assert (change_of(found)[~moves] == 0).all()
    torch.testing.assert_close(
        change_of(found)[moves], change_of(expected)[moves], rtol=3 * IMPORTANCE_RTOL, atol=0
    )
