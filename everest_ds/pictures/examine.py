"""Run a model on a clip to get the arrays that are drawn. The only module of pictures with torch.

Axes: B clips (one), C T H W of a clip, N tokens, S visible tokens, R predicted tokens, P pixel values of a tubelet.
"""

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import fixed_draws
from everest_ds.model.encoder import TokenEncoder
from everest_ds.model.frames import FrameChoice
from everest_ds.model.importance import NO_CHANGE
from everest_ds.model.packing import TokenSet
from everest_ds.model.selection import Selection, SelectionRule
from everest_ds.model.tubelets import ClipGroup, gather_tubelets, unstandardise
from everest_ds.pictures.clip import PicturedClip, TokenChoice


@torch.no_grad()
def examine(
    model: EverestAutoencoder | TokenEncoder,
    clip_CTHW: Tensor,
    rules: Sequence[tuple[str, SelectionRule]],
    *,
    predicts: bool,
    reconstructs: bool = False,
    times_s: NDArray[np.float64] | None = None,
    numbers: NDArray[np.int64] | None = None,
) -> PicturedClip:
    """Rank a clip's tokens, apply each selection rule, and optionally reconstruct the clip.

    Random draws are those of evaluation: the same for every clip and run, independent of torch's generators.

    Args:
        model: Its embedding ranks the tokens. An autoencoder can also reconstruct.
        clip_CTHW: Pixels, uint8, on the model's device.
        rules: Label and rule of each selection.
        predicts: Whether kept tokens are split into visible and predicted ones, as in pre-training; if not, all are
            visible.
        reconstructs: Whether an autoencoder predicts the tokens of each rule.
        times_s: See `PicturedClip`.
        numbers: See `PicturedClip`.
    """
    encoder = model.encoder if isinstance(model, EverestAutoencoder) else model
    (group,) = encoder.group(clip_CTHW[None])
    # The first rule's distance ranks the tokens, even if that rule selects at random.
    importance_BN = encoder.rank(group, rules[0][1].distance) if group.grid.time > 1 else None
    choices = []
    for label, rule in rules:
        selection = _select(group, rule, importance_BN, predicts=predicts)
        rebuilt, loss = None, None
        if reconstructs and isinstance(model, EverestAutoencoder):
            rebuilt, loss = reconstruct(model, group, selection)
        choices.append(
            TokenChoice(
                label=label,
                visible_S=selection.visible.position_M.cpu().numpy(),
                predicted_R=selection.target.position_M.cpu().numpy(),
                reconstruction_THWC=rebuilt,
                loss=loss,
            )
        )
    return PicturedClip(
        frames_THWC=_frames(clip_CTHW),
        grid=group.grid,
        importance_N=None if importance_BN is None else importance_BN[0].cpu().numpy(),
        no_change=NO_CHANGE[rules[0][1].distance],
        choices=tuple(choices),
        times_s=times_s,
        numbers=numbers,
    )


@torch.no_grad()
def choose_frames(
    model: EverestAutoencoder | TokenEncoder, clip_CTHW: Tensor, rule: SelectionRule, num_steps: int
) -> tuple[Tensor, FrameChoice]:
    """Draw ``num_steps`` time steps from a clip of candidates; return the clip of drawn steps, and the choice."""
    encoder = model.encoder if isinstance(model, EverestAutoencoder) else model
    (group,) = encoder.group(clip_CTHW[None])
    noise_BK = fixed_draws(group.grid.time).to(clip_CTHW.device)[None]
    chosen, _, choice = encoder.choose_frames(
        group, noise_BK, num_steps, ratio=rule.selected_ratio, distance=rule.distance
    )
    return chosen.clips_BCTHW[0], choice


@torch.no_grad()
def reconstruct(
    model: EverestAutoencoder, group: ClipGroup, selection: Selection
) -> tuple[NDArray[np.uint8], float]:
    """Return a clip with its target tokens replaced by the model's predictions, frames_THWC uint8, and the loss."""
    output = model.reconstruct(group.clips_BCTHW, selection)
    grid, options, target = group.grid, model.encoder.options, selection.target
    pixels = unstandardise(output.prediction_RP.float(), gather_tubelets([group], target))
    blocks = rearrange(
        group.clips_BCTHW[0].clone(),
        "c (t pt) (h ph) (w pw) -> (t h w) c pt ph pw",
        t=grid.time,
        h=grid.rows,
        w=grid.cols,
    ).contiguous()
    blocks[target.position_M] = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    clip_CTHW = rearrange(
        blocks,
        "(t h w) c pt ph pw -> c (t pt) (h ph) (w pw)",
        t=grid.time,
        h=grid.rows,
        pt=options.tubelet_size,
    )
    return _frames(clip_CTHW), float(output.loss)


def _select(group: ClipGroup, rule: SelectionRule, importance_BN: Tensor | None, *, predicts: bool) -> Selection:
    """Select tokens of one clip as in pre-training or as a classifier, with the draws of evaluation."""
    grid, device = group.grid, group.clips_BCTHW.device
    if predicts:
        noise_BS = fixed_draws(rule.noise_length(grid)).to(device)[None]
        return rule.select(grid, noise_BS, importance_BN)
    noise_BS = fixed_draws(rule.keep_noise_length(grid)).to(device)[None]
    kept = rule.keep(grid, 1, device, noise_BS, importance_BN)
    return Selection(kept, TokenSet.from_positions(kept.position_M.new_empty((1, 0))))


def _frames(clip_CTHW: Tensor) -> NDArray[np.uint8]:
    return rearrange(clip_CTHW, "c t h w -> t h w c").cpu().contiguous().numpy()
