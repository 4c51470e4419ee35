"""Costs counted by running the model under a profiler, on the meta device: no weights, no arithmetic.

The paper's "GFLOPs" are multiply-accumulates at batch 1 of convolutions, linear layers and both attention
products, plus five for each element of a LayerNorm (fvcore's convention). torch's flop counter counts two
operations for a multiply-accumulate, so its totals are halved.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from everest_ds.geometry import TokenGrid, ratio_to_count
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import TokenEncoder
from everest_ds.model.selection import Selection, TokenIndex

LAYER_NORM_MACS = 5


@dataclass(frozen=True, kw_only=True)
class ClipMacs:
    """Multiply-accumulates of one clip's forward pass.

    Attributes:
        embedding_all: Embedding of all tokens of the clip.
        embedding_chosen: Embedding of the chosen tokens, with gradient.
        rest: Everything after the embedding.
        ranks: Whether all tokens are embedded, without gradient, to rank them; not when all are kept.
    """

    embedding_all: float
    embedding_chosen: float
    rest: float
    ranks: bool

    @property
    def paper(self) -> float:
        """The paper's count: there all tokens are embedded once."""
        return self.embedding_all + self.rest

    @property
    def executed(self) -> float:
        """What this implementation computes: chosen tokens are embedded a second time, with gradient."""
        return self.embedding_all * self.ranks + self.embedding_chosen + self.rest


def autoencoder_macs(model: EverestAutoencoder, grid: TokenGrid, *, num_visible: int, num_targets: int) -> ClipMacs:
    """Count one clip through an autoencoder on the meta device.

    Which tokens are visible does not matter for the cost, only how many.
    """
    clip = _meta_clip(model.encoder, grid)
    selection = Selection(visible=_some_tokens(num_visible), target=_some_tokens(num_targets))
    embed = model.encoder.patch_embed
    ranking, _ = _profile(lambda: model.encoder.rank(clip, grid), embed)
    total, embedding = _profile(lambda: model.reconstruct(clip, selection), embed)
    return ClipMacs(embedding_all=ranking, embedding_chosen=embedding, rest=total - embedding, ranks=True)


def classifier_macs(model: EverestClassifier, grid: TokenGrid) -> ClipMacs:
    """Count one clip through a classifier on the meta device."""
    clip = _meta_clip(model, grid)
    ranks = ratio_to_count(grid.num_tokens, model.keep_ratio) < grid.num_tokens
    ranking, _ = _profile(lambda: model.rank(clip, grid), model.patch_embed)
    total, embedding = _profile(lambda: model(clip), model.patch_embed)
    chosen = embedding - ranking if ranks else embedding  # its forward ranks as well
    return ClipMacs(embedding_all=ranking, embedding_chosen=chosen, rest=total - embedding, ranks=ranks)


def _profile(run: Callable[[], object], part: torch.nn.Module) -> tuple[float, float]:
    """Return the multiply-accumulates of a call, and how many of them fell inside one module."""
    inside = 0.0
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.native_layer_norm: _layer_norm_flops})
    entered: list[int] = []

    def enter(module: torch.nn.Module, args: Any) -> None:
        entered.append(counter.get_total_flops())

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal inside
        inside += counter.get_total_flops() - entered.pop()

    hooks = [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    try:
        with counter:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() / 2, inside / 2


def _layer_norm_flops(input_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    elements = 1
    for length in input_shape:
        elements *= int(length)
    return 2 * LAYER_NORM_MACS * elements


def _meta_clip(encoder: TokenEncoder, grid: TokenGrid) -> Tensor:
    tubelet, edge = encoder.options.tubelet_size, encoder.options.patch_size
    shape = (1, 3, grid.time * tubelet, grid.rows * edge, grid.cols * edge)
    return torch.empty(shape, dtype=torch.uint8, device="meta")


def _some_tokens(count: int) -> TokenIndex:
    return TokenIndex.of_equal_counts(torch.empty((1, count), dtype=torch.int64, device="meta"))
