"""Weights into a model, with a report and no surprises.

Place in the flow: Weights -> `load_weights` -> a model that starts from them. What weights lack or a model does
not know is an error, unless it is allowed by name. A classifier is expected to start from an encoder: its head is
then fresh, and the decoder is not used.
"""

from collections.abc import Collection

from torch import Tensor, nn

from everest_ds.errors import UserError
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import TokenEncoder
from everest_ds.model.weights.architecture import name_of_size
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

# Names that `allow` knows besides those of tensors.
POSITIONS, HEADS = "positions", "num_heads"
ENCODER_PARTS = ("patch_embed.", "blocks.")
# What differs by nature when a classifier starts from an encoder (official fine-tuning).
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
        weights: What was read.
        allow: Names of tensors or modules (``decoder``, ``head.weight``) that may be left fresh or ignored;
            ``positions`` for positions of another grid than the weights', ``num_heads`` for other heads.
        clip_grid: The tokens of the clips to come; positions are interpolated where it is not the model's own.

    Raises:
        UserError: Another size (both are named), or a tensor that is missing, unknown or of another shape and
            not allowed. The model is then as it was.
    """
    renamed = _as_for(model, weights)
    _require_same_size(model, weights, allow)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing, extra, misshapen = compare(expected, renamed)
    bare = isinstance(model, EverestClassifier) and weights.architecture.kind != "classifier"
    may_lack = [*allow, *(FRESH_IN_CLASSIFIER if bare else ())]
    may_have = [*allow, *(UNUSED_BY_CLASSIFIER if bare else ())]
    lacking = [name for name in missing if not is_allowed(name, may_lack)]
    unknown = [name for name in extra if not is_allowed(name, may_have)]
    if lacking or unknown:
        way_out = "where that is meant, --init-allow"
        raise UserError(describe_difference(weights.source, lacking, unknown, way_out))
    for name in misshapen:
        if not is_allowed(name, allow):
            shapes = describe_shapes(weights.source, name, renamed[name].shape, expected[name])
            raise UserError(f"{shapes}; to leave it fresh, --init-allow {part_of(name)}")
    interpolated, notes = _check_positions(model, weights, allow, clip_grid)
    notes += _note_on_norms(model, weights)
    fresh = {*missing, *misshapen}
    loaded = {name: renamed[name] for name in expected if name not in fresh}
    model.load_state_dict(loaded, strict=False)
    used = [
        *fresh,
        *extra,
        *([POSITIONS] if _encoder_of(model).grid != weights.architecture.grid else []),
        *([HEADS] if _heads_differ(model, weights) else []),
    ]
    return WeightsReport(
        source=weights.title(),
        loaded=tuple(loaded),
        fresh=tuple(name for name in expected if name in fresh),
        interpolated=tuple(interpolated),
        ignored=weights.ignored + tuple(extra),
        notes=weights.notes + tuple(notes) + unneeded(allow, used),
    )


def _encoder_of(model: EverestAutoencoder | EverestClassifier) -> TokenEncoder:
    return model.encoder if isinstance(model, EverestAutoencoder) else model


def _as_for(model: EverestAutoencoder | EverestClassifier, weights: Weights) -> dict[str, Tensor]:
    """Return tensors under the names that they have in this kind of model."""
    from_autoencoder = weights.architecture.kind == "autoencoder"
    if isinstance(model, EverestAutoencoder):
        if from_autoencoder:
            return weights.tensors
        bare = (*ENCODER_PARTS, "norm.")
        return {f"encoder.{n}" if n.startswith(bare) else n: t for n, t in weights.tensors.items()}
    if not from_autoencoder:
        return weights.tensors
    parts = tuple(f"encoder.{part}" for part in ENCODER_PARTS)
    return {n.removeprefix("encoder.") if n.startswith(parts) else n: t for n, t in weights.tensors.items()}


def _require_same_size(
    model: EverestAutoencoder | EverestClassifier, weights: Weights, allow: Collection[str]
) -> None:
    """Refuse weights of another encoder, by its size rather than by its first tensor."""
    encoder, theirs = _encoder_of(model), weights.architecture
    width, depth = encoder.patch_embed.proj.weight.shape[0], len(encoder.blocks)
    if (theirs.width, theirs.depth) != (width, depth):
        raise UserError(
            f"{weights.source} is {theirs.describe()}; this model is {name_of_size(width, depth)}; use "
            "weights of that size, or the model of these (--model.size)"
        )
    if _heads_differ(model, weights) and not is_allowed(HEADS, allow):
        raise UserError(
            f"{weights.source} says {_heads_of(weights)} attention heads (encoder, decoder), this model has "
            f"{_model_heads(model)}; where the file is wrong (Hugging Face's folders of ViT-small say 16 where 6 "
            f"were trained), --init-allow {HEADS}"
        )
    if isinstance(model, EverestAutoencoder) and theirs.decoder_depth and not is_allowed("decoder", allow):
        decoder_width, decoder_depth = model.mask_token.shape[-1], len(model.decoder.blocks)
        if (theirs.decoder_width, theirs.decoder_depth) != (decoder_width, decoder_depth):
            raise UserError(
                f"{weights.source} has a decoder {theirs.decoder_width} wide with {theirs.decoder_depth} blocks, "
                f"this model's is {decoder_width} wide with {decoder_depth} (--model.decoder-depth); to take what "
                "fits of it, --init-allow decoder"
            )


def _model_heads(model: EverestAutoencoder | EverestClassifier) -> list[int]:
    stacks = [_encoder_of(model).blocks, *([model.decoder.blocks] if isinstance(model, EverestAutoencoder) else [])]
    return [stack[0].attn.num_heads for stack in stacks]  # type: ignore[union-attr, misc]


def _heads_of(weights: Weights) -> list[int | None]:
    architecture = weights.architecture
    return [architecture.num_heads, architecture.decoder_num_heads]


def _heads_differ(model: EverestAutoencoder | EverestClassifier, weights: Weights) -> bool:
    if not weights.architecture.heads_are_known:
        return False
    pairs = zip(_model_heads(model), _heads_of(weights), strict=False)
    return any(theirs is not None and ours != theirs for ours, theirs in pairs)


def _check_positions(
    model: EverestAutoencoder | EverestClassifier,
    weights: Weights,
    allow: Collection[str],
    clip_grid: TokenGrid | None,
) -> tuple[list[str], list[str]]:
    """Return what is interpolated, and notes; positions are fixed, but weights were trained with some."""
    ours, theirs = _encoder_of(model).grid, weights.architecture.grid
    notes = []
    if ours != theirs:
        options = weights.architecture.options
        guess = "" if weights.architecture.grid_is_known else " (it does not say; the official code's)"
        if not is_allowed(POSITIONS, allow):
            raise UserError(
                f"{weights.source} was trained with positions of {_shown(theirs)} tokens{guess}, this model's are "
                f"laid out for {_shown(ours)}; to interpolate them, --model.position-frames "
                f"{theirs.time * options.tubelet_size} --model.position-size {theirs.rows * options.patch_size}; "
                f"to lay them out afresh, --init-allow {POSITIONS}"
            )
        notes.append(
            f"positions laid out afresh for {_shown(ours)} tokens, not those of training, {_shown(theirs)}"
        )
    if clip_grid is None or clip_grid == ours:
        return [], notes
    return [f"positions {_shown(ours)} -> {_shown(clip_grid)} tokens"], notes


def _note_on_norms(model: EverestAutoencoder | EverestClassifier, weights: Weights) -> list[str]:
    ours = _encoder_of(model).blocks[0].norm1.eps  # type: ignore[union-attr]
    theirs = weights.architecture.norm_eps, weights.architecture.last_norm_eps
    if theirs == (ours, _last_norm(model).eps):
        return []
    return [f"there the norms add {theirs[0]:g} to the variance, the last one {theirs[1]:g}; here {ours:g}"]


def _last_norm(model: EverestAutoencoder | EverestClassifier) -> nn.LayerNorm:
    return model.decoder.norm if isinstance(model, EverestAutoencoder) else model.fc_norm


def _shown(grid: TokenGrid) -> str:
    return f"{grid.time}x{grid.rows}x{grid.cols}"
