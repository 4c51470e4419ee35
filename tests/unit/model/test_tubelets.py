from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from everest_ds.benchmark.steps.workbench import moving_clips
from everest_ds.errors import UserError
from everest_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD
from everest_ds.model import tubelets
from everest_ds.model.encoder import EncoderOptions, TokenEncoder
from everest_ds.model.importance import rero_importance
from everest_ds.model.packing import Packing, TokenSet
from everest_ds.model.selection import rank_by_importance
from everest_ds.model.sizes import get_size
from everest_ds.model.tubelets import (
    ClipGroup,
    TubeletEmbedding,
    embed_bytes,
    exact_matmul,
    gather_tubelets,
    has_exact_matmul,
    interpolate_positions,
    reconstruction_target,
    sinusoid_positions,
    standardise,
    to_unit_range,
    token_grid,
)
from everest_ds.tokens import TokenGrid

# For positions of at most 1; measured 1.4e-6.
POSITION_ATOL = 5e-6
FLOAT32_ATOL = 1e-5
GRID = TokenGrid(time=2, rows=2, cols=3)


def random_clips(batch: int = 2, frames: int = 4, height: int = 16, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, frames, height, width), dtype=torch.uint8, generator=generator)


def test_gather_cuts_the_tubelets_of_tokens() -> None:
    clips = random_clips()
    position_M, clip_M = torch.tensor([0, 5, 11, 3, 7]), torch.tensor([0, 0, 0, 1, 1])
    tokens = TokenSet(position_M, clip_M, Packing.from_lengths([3, 2], torch.device("cpu")))
    tubelets = gather_tubelets([ClipGroup(clips, GRID)], tokens)
    assert tubelets.shape == (5, 3, 2, 8, 8)
    for tubelet, position, clip in zip(tubelets, position_M.tolist(), clip_M.tolist(), strict=True):
        step, row, col = position // 6, position % 6 // 3, position % 3
        expected = clips[clip, :, 2 * step : 2 * step + 2, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8]
        assert torch.equal(tubelet, expected)


def test_standardise_uses_imagenet_per_channel() -> None:
    clips = random_clips()
    result = standardise(clips)
    for channel in range(3):
        expected = (clips[:, channel].double() / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        torch.testing.assert_close(result[:, channel].double(), expected, rtol=0, atol=1e-6)
    unit = clips.float() / 255
    assert torch.equal(standardise(unit), result)
    assert torch.equal(unit, clips.float() / 255)  # the function must work in place on its own copy


def test_pixels_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8 pixels or floats"):
        to_unit_range(torch.zeros(1, dtype=torch.int32))


def test_target_is_each_channel_standardised_over_its_tubelet() -> None:
    tubelets = random_clips(batch=3, frames=2, height=8, width=8)
    target = reconstruction_target(tubelets).view(3, 2, 8, 8, 3).numpy()  # frame, row, column, channel
    for r in range(3):
        for channel in range(3):
            pixels = tubelets[r, channel].double().numpy() / 255
            expected = (pixels - pixels.mean()) / (pixels.std(ddof=1) + 1e-6)
            np.testing.assert_allclose(target[r, ..., channel], expected, atol=FLOAT32_ATOL)


def test_target_of_a_flat_tubelet_stays_small() -> None:
    flat = torch.full((1, 3, 2, 8, 8), 200, dtype=torch.uint8)
    assert reconstruction_target(flat).abs().max() < 0.2  # rounding error divided by eps: small and finite


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_single_tubelets_embed_as_in_their_clip(num_layers: int) -> None:
    torch.manual_seed(0)
    embedding = TubeletEmbedding(width=12, tubelet_size=2, patch_size=8, num_layers=num_layers)
    clips = random_clips()
    whole_BND = embedding(standardise(clips))
    tokens = TokenSet.from_mask(torch.ones(2, 12, dtype=torch.bool))
    single = embedding(standardise(gather_tubelets([ClipGroup(clips, GRID)], tokens)))
    assert single.shape == (24, 1, 12)
    torch.testing.assert_close(single.view(2, 12, 12), whole_BND, rtol=0, atol=FLOAT32_ATOL)


@pytest.mark.parametrize(("num_layers", "kernels"), [
    (1, [(2, 16, 16)]),
    (2, [(2, 4, 4), (1, 4, 4)]),
    (3, [(2, 4, 4), (1, 2, 2), (1, 2, 2)]),
])  # fmt: skip
def test_kernels_are_those_of_table_15(num_layers: int, kernels: list[tuple[int, int, int]]) -> None:
    embedding = TubeletEmbedding(width=8, tubelet_size=2, patch_size=16, num_layers=num_layers)
    assert [layer.kernel_size for layer in [*embedding.stem, embedding.proj]] == kernels


def test_embedding_computes_in_the_inputs_dtype() -> None:
    embedding = TubeletEmbedding(width=8, tubelet_size=2, patch_size=8).bfloat16()
    pixels = standardise(random_clips())
    assert embedding(pixels).dtype == torch.float32
    assert embedding(pixels.bfloat16()).dtype == torch.bfloat16


def test_positions_equal_the_official_formula() -> None:
    grid, width = TokenGrid(time=8, rows=14, cols=14), 10
    table = sinusoid_positions(grid, width).numpy()
    for position in (0, 1, 777, 1567):
        for channel in range(width):
            angle = position / np.power(10000, 2 * (channel // 2) / width)
            expected = np.sin(angle) if channel % 2 == 0 else np.cos(angle)
            assert abs(table[position, channel] - expected) < 1e-7


def test_interpolated_positions_keep_what_they_should() -> None:
    grid = TokenGrid(time=4, rows=3, cols=3)
    table = sinusoid_positions(grid, 8)
    assert interpolate_positions(table, grid, grid) is table
    larger = interpolate_positions(table, grid, TokenGrid(time=8, rows=6, cols=3))
    assert larger.shape == (8 * 6 * 3, 8)
    constant = torch.ones(grid.num_tokens, 2)
    torch.testing.assert_close(
        interpolate_positions(constant, grid, TokenGrid(time=2, rows=5, cols=7)), torch.ones(70, 2)
    )


def resample_1d(values: np.ndarray, length: int) -> np.ndarray:
    """Interpolate linearly between cell centres along the first axis; values are constant beyond the ends."""
    centres = (np.arange(length) + 0.5) * len(values) / length - 0.5
    rows = values.reshape(len(values), -1).astype(np.float64)
    columns = [np.interp(centres, np.arange(len(values)), column) for column in rows.T]
    return np.stack(columns, axis=1).reshape(length, *values.shape[1:])


@pytest.mark.parametrize("num_frames", [8, 16, 24, 32])
@pytest.mark.parametrize("edge", [112, 224, 384])
def test_positions_of_other_clips_are_interpolated_along_each_axis(num_frames: int, edge: int) -> None:
    """The oracle resamples time, rows and columns one after another with numpy's interpolation in float64."""
    grid, width = TokenGrid(time=8, rows=14, cols=14), 6
    to_grid = TokenGrid.of_clip(num_frames=num_frames, height=edge, width=edge, tubelet_size=2, patch_size=16)
    table = sinusoid_positions(grid, width)
    volume = table.numpy().reshape(8, 14, 14, width)
    for axis, length in enumerate((to_grid.time, to_grid.rows, to_grid.cols)):
        volume = np.moveaxis(resample_1d(np.moveaxis(volume, axis, 0), length), 0, axis)
    found = interpolate_positions(table, grid, to_grid)
    assert found.shape == (to_grid.num_tokens, width)
    assert np.abs(found.numpy() - volume.reshape(-1, width)).max() < POSITION_ATOL


def test_clips_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="image height=20"):
        token_grid(random_clips(height=20), tubelet_size=2, patch_size=8)
    with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\)"):
        token_grid(torch.zeros(2, 4, 16, 16), tubelet_size=2, patch_size=8)


KERNEL = (2, 16, 16)
BYTE_GRID = TokenGrid(time=4, rows=7, cols=7)
CPU = torch.device("cpu")
WEIGHT_DTYPES = [torch.float32, torch.bfloat16]
# For embeddings up to 4. Measured 8e-6 here, 1.2e-5 on real video, like a float32 convolution; bfloat16 has 2e-2.
EMBEDDING_ATOL = 3e-5
# Measured 9e-7 here and 7e-6 on real video; a float32 convolution has 1.6e-6 and 1.7e-5.
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
    """Return each token's l2 distance from the same place one step before, from the second step on, (B, N')."""
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
    assert 0.2 < moves.double().mean() < 0.9  # some tokens change, others do not
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
    """Use exact matmuls on the CPU, as on a GPU where they are faster."""
    monkeypatch.setattr(tubelets, "has_exact_matmul", lambda device: True)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_encoder_ranks_alike_either_way(
    dtype: torch.dtype, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    encoder = TokenEncoder(get_size("nano"), BYTE_GRID).to(dtype)
    (group,) = encoder.group(make_clips())
    before = encoder.rank(group)
    request.getfixturevalue("exact_cpu")
    monkeypatch.setattr("everest_ds.model.encoder.standardise", None)  # the exact path must not standardise pixels
    after = encoder.rank(group)
    assert not torch.equal(after, before)  # another path was used
    torch.testing.assert_close(after, before, rtol=3 * IMPORTANCE_RTOL, atol=0)
    count = BYTE_GRID.num_tokens * 3 // 10
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
    encoder = TokenEncoder(get_size("nano"), BYTE_GRID, EncoderOptions())
    (group,) = encoder.group(make_clips())
    x_BND = encoder.patch_embed(standardise(group.clips_BCTHW))
    assert torch.equal(encoder.rank(group), rero_importance(x_BND, BYTE_GRID))


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
