"""Importance: how much each token changed since the time step before. The selection ranks tokens by it.

Place in the flow: embeddings x_BND (no gradient, float32) -> importance_BN. Axes: B clips, N = T * J tokens of T
time steps, D width.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from everest_ds.tokens import DistanceName, TokenGrid


def rero_importance(x_BND: Tensor, grid: TokenGrid, distance: DistanceName = "l2") -> Tensor:
    """Return each token's distance from the token at the same place one time step earlier.

    The first time step has no predecessor. It gets the values of the second, so every clip has exact ties.

    Args:
        x_BND: Tubelet embeddings without positions, float32.
        grid: The clips' token grid, of at least two time steps.
        distance: A name of `DISTANCES`.

    Returns:
        importance_BN float32; larger is more change.

    Raises:
        ValueError: Not float32 (bfloat16 changes 1 to 14 % of the chosen tokens), another number of tokens than
            the grid's, or a single time step.

    Source: EVEREST Sec. 4.1, Eq. 2, and Appendix B for the distances; the first step as in the official code.
    Differs from the official code: any grid, always float32 (there half precision under autocast); the released
    code has l2 only.
    """
    if x_BND.dtype != torch.float32:
        raise ValueError(f"importance needs float32 embeddings, got {x_BND.dtype}")
    if x_BND.shape[1] != grid.num_tokens:
        raise ValueError(f"expected {grid.num_tokens} tokens a clip for {grid}, got {x_BND.shape[1]}")
    if grid.time < 2:
        raise ValueError("importance compares a time step with the one before; the clip has only one")
    x_BTJD = rearrange(x_BND, "b (t j) d -> b t j d", t=grid.time)
    change = DISTANCES[distance](x_BTJD[:, 1:], x_BTJD[:, :-1])
    return torch.cat((change[:, :1], change), dim=1).flatten(1)


def l2_distance(x: Tensor, y: Tensor) -> Tensor:
    """``sqrt(sum_d (x_d - y_d)^2)``, at least 0: the default (EVEREST Table 9)."""
    return torch.linalg.vector_norm(x - y, dim=-1)


def l1_distance(x: Tensor, y: Tensor) -> Tensor:
    """``sum_d |x_d - y_d|``, at least 0 (EVEREST Table 9)."""
    return torch.linalg.vector_norm(x - y, ord=1, dim=-1)


def negative_cosine(x: Tensor, y: Tensor) -> Tensor:
    """``-<x, y> / (|x| |y|)``, in [-1, 1]; a norm below 1e-8 counts as 1e-8 (EVEREST Table 9)."""
    return -F.cosine_similarity(x, y, dim=-1)


def negative_cka(x: Tensor, y: Tensor) -> Tensor:
    """Negative linear CKA of two token embeddings: ``-<x', y'>^2 / (|x'|^2 |y'|^2)``, x' = x less its mean.

    The D channels are the samples. Centred kernel alignment of K = x x^T and L = y y^T (Cortes et al., 2012) then
    is the squared correlation of the channels. In [-1, 0]; 0 if all channels of either token are equal.

    Source: EVEREST Sec. 4.1 and Table 9. The paper does not name the samples; a single token has no others.
    """
    x, y = (z - z.mean(dim=-1, keepdim=True) for z in (x, y))
    return -F.cosine_similarity(x, y, dim=-1).square()


# Importance of an unchanged token. Because of rounding, the cosine of a token with itself is not exactly 1.
NO_CHANGE: dict[DistanceName, float] = {"l2": 0.0, "l1": 0.0, "cosine": -1 + 1e-6, "cka": -1 + 1e-6}

DISTANCES: dict[DistanceName, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": l2_distance,
    "l1": l1_distance,
    "cosine": negative_cosine,
    "cka": negative_cka,
}
