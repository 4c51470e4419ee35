from __future__ import annotations

import numpy as np
import pytest
import torch

from everest_ds.errors import UserError
from everest_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD
from everest_ds.model.packing import TokenSet
from everest_ds.model.tubelets import (
    TubeletEmbedding,
    gather_tubelets,
    interpolate_positions,
    reconstruction_target,
    sinusoid_positions,
    standardise,
    to_unit_range,
    token_grid,
)
from everest_ds.tokens import TokenGrid

# Positions are at most 1; worst case seen 1.4e-6.
POSITION_ATOL = 5e-6
FLOAT32_ATOL = 1e-5


def random_clips(batch: int = 2, frames: int = 4, height: int = 16, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, frames, height, width), dtype=torch.uint8, generator=generator)


def test_gather_cuts_the_tubelets_that_the_index_names() -> None:
    clips = random_clips()
    position_M, clip_M = torch.tensor([0, 5, 11, 3, 7]), torch.tensor([0, 0, 0, 1, 1])
    index = TokenSet(position_M, clip_M, None)  # type: ignore[arg-type]
    tubelets = gather_tubelets(clips, index, tubelet_size=2, patch_size=8)
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
    assert torch.equal(unit, clips.float() / 255)  # it works in place, on a copy of its own


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
    assert reconstruction_target(flat).abs().max() < 0.2  # rounding over eps: no infinity, nothing large


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_single_tubelets_embed_as_in_their_clip(num_layers: int) -> None:
    torch.manual_seed(0)
    embedding = TubeletEmbedding(width=12, tubelet_size=2, patch_size=8, num_layers=num_layers)
    clips = random_clips()
    whole_BND = embedding(standardise(clips))
    index = TokenSet.from_mask(torch.ones(2, 12, dtype=torch.bool))
    single = embedding(standardise(gather_tubelets(clips, index, tubelet_size=2, patch_size=8)))
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
    """Linear interpolation between the centres of cells, held at the ends; along the first axis."""
    centres = (np.arange(length) + 0.5) * len(values) / length - 0.5
    rows = values.reshape(len(values), -1).astype(np.float64)
    columns = [np.interp(centres, np.arange(len(values)), column) for column in rows.T]
    return np.stack(columns, axis=1).reshape(length, *values.shape[1:])


@pytest.mark.parametrize("num_frames", [8, 16, 24, 32])
@pytest.mark.parametrize("edge", [112, 224, 384])
def test_positions_of_other_clips_are_interpolated_along_each_axis(num_frames: int, edge: int) -> None:
    """The oracle resamples time, rows and columns one after the other, in float64, by numpy's own interpolation."""
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
