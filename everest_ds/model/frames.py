"""Information-intensive frame selection: which of a clip's candidate frames are trained on.

Place in the flow: more frames are read than a clip has -> importance_BN of all of them -> tokens per time step ->
drawn steps -> a clip of these frames only, from which tokens are selected as usual. Nothing here synchronises with
the device. Axes: B clips, N candidate tokens of a clip, C candidate time steps (of pixels: colour channels), T
chosen time steps (of pixels: frames), J tokens of a step, H W pixels.

Source: EVEREST Sec. 4.2, which leaves three things open. Here, c_i counts the tokens of time step i (frames 2i and
2i + 1) among the share rho_pre of all candidate tokens, ranked over the whole candidate set. Steps are drawn one
after another, with probabilities renormalised over the remaining ones. The drawn steps, in order of time, form an
ordinary clip. Its importance is computed again between its own neighbours, which may not be adjacent in the video.
Each clip is drawn again in every epoch, in pre-training only.

Differs from the official code, which has none of this.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from everest_ds.model.selection import rank_by_importance
from everest_ds.tokens import TokenGrid

# Weight of steps without chosen tokens: they are drawn only after all others.
VANISHING_WEIGHT = 1e-30
# A noise of exactly 0 counts as half of the smallest float32 step of uniform noise.
LEAST_NOISE = 2.0**-25


class FrameChoice(NamedTuple):
    """The chosen time steps of each clip, and the counts that gave their probabilities.

    A named tuple, because ZeRO-3 finds tensors in tuples but not in dataclasses.

    Attributes:
        steps_BT: Chosen time steps, int64, ascending.
        counts_BC: Chosen tokens of each candidate step, int64.
    """

    steps_BT: Tensor
    counts_BC: Tensor


def count_per_step(importance_BN: Tensor, grid: TokenGrid, count: int, *, no_change: float = 0.0) -> Tensor:
    """Count how many of each clip's ``count`` most important tokens are in each time step (c_i of the paper).

    Unchanged tokens are never counted. They tie, so all of the counted ones would be in the clip's first steps.

    Args:
        importance_BN: Of all candidate tokens, float32.
        grid: The candidates' token grid.
        count: How many tokens are chosen over the whole candidate set.
        no_change: Importance of an unchanged token (`importance.NO_CHANGE`).

    Returns:
        counts_BC int64; a row's sum is at most ``count``.

    Raises:
        ValueError: The importance does not fit the grid, or ``count`` is not between 1 and the grid's tokens.
    """
    if importance_BN.ndim != 2 or importance_BN.shape[1] != grid.num_tokens:
        raise ValueError(f"expected importance (B, {grid.num_tokens}) for {grid}, got {tuple(importance_BN.shape)}")
    if not 1 <= count <= grid.num_tokens:
        raise ValueError(f"count={count} must be between 1 and {grid.num_tokens}")
    chosen_BS = rank_by_importance(importance_BN)[:, :count]
    is_chosen_BN = torch.zeros_like(importance_BN, dtype=torch.bool).scatter_(1, chosen_BS, True)
    is_chosen_BN &= importance_BN > no_change
    return rearrange(is_chosen_BN, "b (c j) -> b c j", c=grid.time).sum(dim=2)


def draw_steps(counts_BC: Tensor, noise_BC: Tensor, num_steps: int) -> Tensor:
    """Draw time steps without replacement, each with probability ``c_i / sum c`` over the remaining steps.

    This is done as an exponential race: step i arrives at time ``-log(u_i) / c_i`` with u_i uniform, and the first
    ``num_steps`` to arrive are taken. It equals sequential draws. The times are exponential with rate c_i, so step
    i is first with probability c_i / sum c. Exponential times have no memory, so the next one is drawn in the same
    way among the remaining steps.

    Steps without chosen tokens come after all others, in uniform order. They fill the clip if fewer than
    ``num_steps`` steps have chosen tokens.

    Args:
        counts_BC: From `count_per_step`, at least 0.
        noise_BC: Uniform noise in [0, 1), float32, one value a step; u is 1 minus it, so that 0 gives no infinity.
            Arrival times are float64, so that two devices agree on their order.
        num_steps: Steps of the clip (tau of the paper).

    Returns:
        steps_BT int64, ascending; no step twice.

    Raises:
        ValueError: More steps than candidates, or noise of another shape or dtype (fewer bits would often tie).
    """
    if counts_BC.ndim != 2 or noise_BC.shape != counts_BC.shape:
        raise ValueError(f"expected (B, C), got counts {tuple(counts_BC.shape)} and noise {tuple(noise_BC.shape)}")
    if noise_BC.dtype != torch.float32:
        raise ValueError(f"expected float32 noise, got {noise_BC.dtype}")
    candidates = counts_BC.shape[1]
    if not 1 <= num_steps <= candidates:
        raise ValueError(f"num_steps={num_steps} must be between 1 and the {candidates} candidate steps")
    # Clamped, because a time of 0 would beat every other, whatever the weights.
    waiting_BC = -torch.log1p(-noise_BC.double().clamp_min(LEAST_NOISE))
    arrival_BC = waiting_BC / counts_BC.double().clamp_min(VANISHING_WEIGHT)
    return torch.argsort(arrival_BC, dim=1, stable=True)[:, :num_steps].sort(dim=1).values


def gather_steps(clips_BCTHW: Tensor, steps_BT: Tensor, tubelet_size: int) -> Tensor:
    """Cut time steps out of clips, copying nothing else: (B, C, T * tubelet_size, H, W) in the clips' dtype.

    Raises:
        ValueError: The frames do not divide into steps, or the steps are for another number of clips.
    """
    num_clips, num_channels, num_frames = clips_BCTHW.shape[:3]
    if num_frames % tubelet_size:
        raise ValueError(f"{num_frames} frames are not a whole number of steps of {tubelet_size} frames")
    if steps_BT.ndim != 2 or len(steps_BT) != num_clips:
        raise ValueError(f"expected steps of {num_clips} clips, got shape {tuple(steps_BT.shape)}")
    # One row a channel and step, so that one gather makes the only copy.
    rows = rearrange(clips_BCTHW, "b c (t p) h w -> (b c t) p h w", p=tubelet_size)
    channel_BC = torch.arange(num_clips * num_channels, device=steps_BT.device).view(num_clips, num_channels)
    row_BCT = channel_BC[:, :, None] * (num_frames // tubelet_size) + steps_BT[:, None, :]
    chosen = rows.index_select(0, row_BCT.flatten())
    return rearrange(chosen, "(b c t) p h w -> b c (t p) h w", b=num_clips, c=num_channels)
