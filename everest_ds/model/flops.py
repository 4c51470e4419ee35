"""Costs counted by running the model under a profiler, on the meta device: no weights, no arithmetic.

The paper's "GFLOPs" are multiply-accumulates at batch 1 of convolutions, linear layers and both matmuls of
attention, plus five for each element of a LayerNorm (fvcore's convention). torch's flop counter counts two
operations for a multiply-accumulate, so its totals are halved.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import TokenEncoder
from everest_ds.model.packing import TokenSet
from everest_ds.model.selection import Selection
from everest_ds.model.tubelets import ClipGroup
from everest_ds.tokens import TokenGrid

LAYER_NORM_MACS = 5


@dataclass(frozen=True, kw_only=True)
class ClipMacs:
    """Multiply-accumulates of one clip's forward pass.

    Attributes:
        embedding_all: Embedding of all tokens of the clip.
        embedding_chosen: Embedding of the chosen tokens, with gradient.
        rest: Everything after the embedding.
        ranking: Embedding of all tokens, or of all candidate frames, to rank them; 0 where nothing is ranked.
    """

    embedding_all: float
    embedding_chosen: float
    rest: float
    ranking: float

    @property
    def paper(self) -> float:
        """The paper's count, in which all tokens are embedded once."""
        return self.embedding_all + self.rest

    @property
    def executed(self) -> float:
        """The count of this implementation, which embeds chosen tokens a second time, with gradient."""
        return self.ranking + self.embedding_chosen + self.rest


def autoencoder_macs(
    model: EverestAutoencoder,
    grid: TokenGrid,
    *,
    num_visible: int,
    num_targets: int,
    ranked: TokenGrid | None,
) -> ClipMacs:
    """Count one clip through an autoencoder on the meta device.

    Args:
        model: The autoencoder.
        grid: The clip's tokens.
        num_visible: Tokens that the encoder sees; which ones does not change the cost.
        num_targets: Tokens that the decoder predicts.
        ranked: The grid that is ranked: the clip's, or that of its candidate frames; None if nothing is ranked.
    """
    encoder = model.encoder
    selection = Selection(visible=_some_tokens(num_visible), target=_some_tokens(num_targets))
    embedding_all = _ranking_macs(encoder, grid)
    total, embedding = _profile(lambda: model.reconstruct(_meta_clip(encoder, grid).clips_BCTHW, selection))
    return ClipMacs(
        embedding_all=embedding_all,
        embedding_chosen=embedding,
        rest=total - embedding,
        ranking=0 if ranked is None else _ranking_macs(encoder, ranked),
    )


def classifier_macs(model: EverestClassifier, grid: TokenGrid) -> ClipMacs:
    """Count one clip through a classifier on the meta device."""
    clip = _meta_clip(model, grid)
    embedding_all = _ranking_macs(model, grid)
    ranking = embedding_all if model.rule.ranks_to_keep(grid) else 0
    total, embedding = _profile(lambda: model(clip.clips_BCTHW))
    return ClipMacs(
        embedding_all=embedding_all,
        embedding_chosen=embedding - ranking,  # the measured forward pass includes ranking
        rest=total - embedding,
        ranking=ranking,
    )


def _ranking_macs(encoder: TokenEncoder, grid: TokenGrid) -> float:
    return _profile(lambda: encoder.rank(_meta_clip(encoder, grid)))[0]


def _profile(run: Callable[[], object]) -> tuple[float, float]:
    """Return the multiply-accumulates of a call, and those of its tubelet embedding."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.native_layer_norm: _layer_norm_flops})
    with counter:
        run()
    counts = counter.get_flop_counts()
    embedding = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith(".patch_embed"))
    return counter.get_total_flops() / 2, embedding / 2


def _layer_norm_flops(input_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * LAYER_NORM_MACS * math.prod(input_shape)


def _meta_clip(encoder: TokenEncoder, grid: TokenGrid) -> ClipGroup:
    tubelet, edge = encoder.options.tubelet_size, encoder.options.patch_size
    shape = (1, 3, grid.time * tubelet, grid.rows * edge, grid.cols * edge)
    return ClipGroup(torch.empty(shape, dtype=torch.uint8, device="meta"), grid)


def _some_tokens(count: int) -> TokenSet:
    return TokenSet.from_positions(torch.empty((1, count), dtype=torch.int64, device="meta"))
