"""How much each token changed since the time step before: what the selection ranks by.

Place in the flow: embeddings x_BND (no gradient, float32) -> importance_BN. Axes: B clips, N = time * J tokens.
"""

import torch
from einops import rearrange
from torch import Tensor

from everest_ds.geometry import TokenGrid


def rero_importance(x_BND: Tensor, grid: TokenGrid) -> Tensor:
    """Return each token's l2 distance from the token at the same place one time step earlier.

    The first time step has no predecessor: it gets the values of the second, so every clip holds exact ties.

    Args:
        x_BND: Tubelet embeddings without positions, float32.
        grid: The clips' token grid, of at least two time steps.

    Returns:
        importance_BN, float32, at least 0.

    Raises:
        ValueError: Not float32 (bfloat16 changes 1 to 14 % of the chosen tokens), a token count that is not
            the grid's, or a single time step.

    Source: EVEREST Sec. 4.1, Eq. 2 with the l2 norm; the first step as in the official code.
    Differs from the official code: any grid, always float32 (there half precision under autocast).
    """
    if x_BND.dtype != torch.float32:
        raise ValueError(f"importance needs float32 embeddings, got {x_BND.dtype}")
    if x_BND.shape[1] != grid.num_tokens:
        raise ValueError(f"expected {grid.num_tokens} tokens a clip for {grid}, got {x_BND.shape[1]}")
    if grid.time < 2:
        raise ValueError("importance compares a time step with the one before; the clip has only one")
    x_BTJD = rearrange(x_BND, "b (t j) d -> b t j d", t=grid.time)
    change = torch.linalg.vector_norm(x_BTJD[:, 1:] - x_BTJD[:, :-1], dim=-1)
    return torch.cat((change[:, :1], change), dim=1).flatten(1)
