"""Distances against their definitions in float64, computed in another way than the code does."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from everest_ds.model.importance import DISTANCES, rero_importance
from everest_ds.tokens import DistanceName, TokenGrid

GRID = TokenGrid(time=4, rows=2, cols=3)
# float32 against float64 for embeddings of order 1 with 24 channels. Measured: norms 1.8e-7 relative; cosines,
# which may be near 0, 3.4e-8 absolute.
RTOL, ATOL = 1e-6, 2e-7


def random_tokens(width: int = 24, num_clips: int = 2) -> torch.Tensor:
    return torch.randn(num_clips, GRID.num_tokens, width, generator=torch.Generator().manual_seed(width))


def kernel_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return CKA by its definition over kernel matrices: <HKH, HLH> / (|HKH| |HLH|), with channels as samples."""
    num = len(x)
    centring = torch.eye(num, dtype=torch.float64) - 1 / num
    kernels = [centring @ torch.outer(z, z) @ centring for z in (x, y)]
    return float((kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm()))


def plain_distance(name: str, x: torch.Tensor, y: torch.Tensor) -> float:
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    if name == "l2":
        return math.sqrt(sum((p - q) ** 2 for p, q in pairs))
    if name == "l1":
        return sum(abs(p - q) for p, q in pairs)
    if name == "cosine":
        norms = [math.sqrt(sum(p * p for p in z.tolist())) for z in (x, y)]
        return -sum(p * q for p, q in pairs) / (norms[0] * norms[1])
    return -kernel_cka(x, y)


@pytest.mark.parametrize("name", get_args(DistanceName))
def test_distance_equals_its_definition(name: DistanceName) -> None:
    x_BND = random_tokens()
    importance_BN = rero_importance(x_BND, GRID, name)
    places = GRID.tokens_per_step
    for b in range(2):
        for n in range(GRID.num_tokens):
            step, place = divmod(n, places)
            later, earlier = (x_BND[b, (max(step, 1) - back) * places + place].double() for back in (0, 1))
            assert importance_BN[b, n].item() == pytest.approx(
                plain_distance(name, later, earlier), rel=RTOL, abs=ATOL
            )


def test_every_distance_of_the_configuration_is_there() -> None:
    assert set(DISTANCES) == set(get_args(DistanceName))


@pytest.mark.parametrize("name", get_args(DistanceName))
def test_what_does_not_change_is_least_important(name: DistanceName) -> None:
    x_BND = random_tokens()
    x_BND[:, GRID.tokens_per_step :] = x_BND[:, : -GRID.tokens_per_step].clone()
    x_BND = x_BND.view(2, GRID.time, -1, 24)
    x_BND[:, 1:] = x_BND[:, :1]
    x_BND[:, 2, 4] = torch.randn(24, generator=torch.Generator().manual_seed(3))
    importance = rero_importance(x_BND.flatten(1, 2), GRID, name).view(2, GRID.time, -1)
    changed = torch.zeros_like(importance, dtype=torch.bool)
    changed[:, 2, 4] = changed[:, 3, 4] = True  # the change to the new content, and back
    assert importance[changed].min() > importance[~changed].max() + 0.1


@pytest.mark.parametrize(
    ("name", "low", "high"), [("cosine", -1, 1), ("cka", -1, 0), ("l1", 0, 1e9), ("l2", 0, 1e9)]
)
def test_ranges_hold_where_embeddings_vanish_or_are_flat(name: DistanceName, low: float, high: float) -> None:
    flat = torch.ones(1, GRID.num_tokens, 8)
    for x_BND in (torch.zeros_like(flat), flat, random_tokens(8, 1) * flat, random_tokens(8, 1) * 1e-20):
        importance = rero_importance(x_BND, GRID, name)
        assert importance.isfinite().all()
        assert low - 1e-6 <= importance.min()
        assert importance.max() <= high + 1e-6
