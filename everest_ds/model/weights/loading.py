"""Loads weights into a model, and reports what was loaded.

Place in the flow: Weights -> `load_weights` -> a model that starts from them. A missing or unknown tensor is an
error, unless it is allowed by name. A classifier may start from an encoder: its head is then fresh, and the decoder
is not used.
"""

from collections.abc import Collection

from torch import Tensor

from everest_ds.errors import UserError
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.weights.architecture import Architecture, name_of_size
from everest_ds.model.weights.reading import Weights
from everest_ds.model.weights.report import (
    WeightsReport,
    compare,
    describe_difference,
    describe_shapes,
    is_allowed,
    part_of,
    unneeded,
)
from everest_ds.tokens import TokenGrid

# Names that `allow` accepts besides those of tensors.
POSITIONS, HEADS = "positions", "num_heads"
ENCODER_PARTS = ("patch_embed.", "blocks.")
# Parts that always differ when a classifier starts from an encoder (official fine-tuning).
FRESH_IN_CLASSIFIER = ("fc_norm", "head")
UNUSED_BY_CLASSIFIER = ("decoder", "encoder_to_decoder", "mask_token", "encoder.norm", "norm")


def load_weights(
    model: EverestAutoencoder | EverestClassifier,
    weights: Weights,
    *,
    allow: Collection[str] = (),
    clip_grid: TokenGrid | None = None,
) -> WeightsReport:
    """Load weights into a model.

    Args:
        model: A model on the CPU, not sharded.
        weights: From `read_weights`.
        allow: Names of tensors or modules (``decoder``, ``head.weight``) that may be left fresh or ignored;
            ``positions`` for positions of another grid, ``num_heads`` for another number of heads.
        clip_grid: The tokens of future clips; if it is not the model's own grid, positions are interpolated.

    Raises:
        UserError: The sizes differ, or a tensor is missing, unknown or of another shape and not allowed. The model
            is then unchanged.
    """
    ours, theirs = _architecture(model), weights.architecture
    heads_differ = _require_same_size(ours, weights, allow)
    renamed = _rename_for(ours, weights)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing, extra, misshapen = compare(expected, renamed)
    is_bare = ours.kind == "classifier" and theirs.kind != "classifier"
    lacking = [n for n in missing if not is_allowed(n, [*allow, *(FRESH_IN_CLASSIFIER if is_bare else ())])]
    unknown = [n for n in extra if not is_allowed(n, [*allow, *(UNUSED_BY_CLASSIFIER if is_bare else ())])]
    if lacking or unknown:
        way_out = "if that is intended, use --init-allow"
        raise UserError(describe_difference(weights.source, lacking, unknown, way_out))
    for name in misshapen:
        if not is_allowed(name, allow):
            shapes = describe_shapes(weights.source, name, renamed[name].shape, expected[name])
            raise UserError(f"{shapes}; to initialise it afresh, use --init-allow {part_of(name)}")
    notes = _check_positions(ours.grid, weights, allow)
    if (theirs.norm_eps, theirs.last_norm_eps) != (ours.norm_eps, ours.last_norm_eps):
        notes += (
            f"their norms add {theirs.norm_eps:g} to the variance, the last one {theirs.last_norm_eps:g}; this "
            f"model's add {ours.norm_eps:g}",
        )
    fresh = {*missing, *misshapen}
    loaded = {name: renamed[name] for name in expected if name not in fresh}
    model.load_state_dict(loaded, strict=False)
    to_grid = clip_grid or ours.grid
    interpolated = f"positions {_shown(ours.grid)} -> {_shown(to_grid)} tokens"
    used = [*fresh, *extra, *([POSITIONS] if ours.grid != theirs.grid else []), *([HEADS] if heads_differ else [])]
    return WeightsReport(
        source=weights.title(),
        loaded=tuple(loaded),
        fresh=tuple(name for name in expected if name in fresh),
        interpolated=() if to_grid == ours.grid else (interpolated,),
        ignored=weights.ignored + tuple(extra),
        notes=weights.notes + notes + unneeded(allow, used),
    )


def _architecture(model: EverestAutoencoder | EverestClassifier) -> Architecture:
    is_autoencoder = isinstance(model, EverestAutoencoder)
    encoder = model.encoder if isinstance(model, EverestAutoencoder) else model
    return Architecture(
        kind="autoencoder" if is_autoencoder else "classifier",
        width=encoder.size.width,
        depth=len(encoder.blocks),
        num_heads=encoder.size.num_heads,
        heads_are_known=True,
        options=encoder.options,
        grid=encoder.grid,
        grid_is_known=True,
        decoder_width=encoder.size.decoder_width if is_autoencoder else None,
        decoder_depth=len(model.decoder.blocks) if isinstance(model, EverestAutoencoder) else None,
        decoder_num_heads=encoder.size.decoder_num_heads if is_autoencoder else None,
        norm_eps=encoder.blocks[0].norm1.eps,  # type: ignore[union-attr, arg-type]
        last_norm_eps=model.decoder.norm.eps if isinstance(model, EverestAutoencoder) else model.fc_norm.eps,
    )


def _rename_for(ours: Architecture, weights: Weights) -> dict[str, Tensor]:
    """Return tensors under their names in this kind of model."""
    from_autoencoder = weights.architecture.kind == "autoencoder"
    if (ours.kind == "autoencoder") == from_autoencoder:
        return weights.tensors
    if from_autoencoder:
        parts = tuple(f"encoder.{part}" for part in ENCODER_PARTS)
        return {n.removeprefix("encoder.") if n.startswith(parts) else n: t for n, t in weights.tensors.items()}
    bare = (*ENCODER_PARTS, "norm.")
    return {f"encoder.{n}" if n.startswith(bare) else n: t for n, t in weights.tensors.items()}


def _require_same_size(ours: Architecture, weights: Weights, allow: Collection[str]) -> bool:
    """Refuse weights of another width, depth, number of heads or decoder; return whether heads differ."""
    theirs = weights.architecture
    if (theirs.width, theirs.depth) != (ours.width, ours.depth):
        raise UserError(
            f"{weights.source} is {theirs.describe()}; this model is {name_of_size(ours.width, ours.depth)}. Use "
            "weights of that size, or choose the weights' size with --model.size"
        )
    is_autoencoder = ours.kind == "autoencoder"
    our_heads = [ours.num_heads, *([ours.decoder_num_heads] if is_autoencoder else [])]
    their_heads = [theirs.num_heads, theirs.decoder_num_heads]
    pairs = zip(our_heads, their_heads, strict=False)
    heads_differ = theirs.heads_are_known and any(b is not None and a != b for a, b in pairs)
    if heads_differ and not is_allowed(HEADS, allow):
        raise UserError(
            f"{weights.source} records {their_heads} attention heads (encoder, decoder), this model has "
            f"{our_heads}; if the record is wrong (Hugging Face's ViT-small folders say 16, but 6 were trained), "
            f"use --init-allow {HEADS}"
        )
    decoders_differ = (theirs.decoder_width, theirs.decoder_depth) != (ours.decoder_width, ours.decoder_depth)
    if is_autoencoder and theirs.decoder_depth and decoders_differ and not is_allowed("decoder", allow):
        raise UserError(
            f"{weights.source} has a decoder of width {theirs.decoder_width} and {theirs.decoder_depth} blocks, "
            f"this model's has width {ours.decoder_width} and {ours.decoder_depth} blocks (--model.decoder-depth); "
            "to load the tensors that fit, use --init-allow decoder"
        )
    return heads_differ


def _check_positions(ours: TokenGrid, weights: Weights, allow: Collection[str]) -> tuple[str, ...]:
    """Return a note if allowed positions differ. Positions are fixed, but the weights were trained with theirs."""
    theirs, options = weights.architecture.grid, weights.architecture.options
    if ours == theirs:
        return ()
    if not is_allowed(POSITIONS, allow):
        guess = "" if weights.architecture.grid_is_known else " (assumed)"
        raise UserError(
            f"{weights.source} has positions for {_shown(theirs)} tokens{guess}, this model for {_shown(ours)}. "
            f"To interpolate, use --model.position-frames {theirs.time * options.tubelet_size} "
            f"--model.position-size {theirs.rows * options.patch_size}; for new positions, --init-allow {POSITIONS}"
        )
    return (f"positions are new for {_shown(ours)} tokens; the weights were trained with {_shown(theirs)}",)


def _shown(grid: TokenGrid) -> str:
    return f"{grid.time}x{grid.rows}x{grid.cols}"
