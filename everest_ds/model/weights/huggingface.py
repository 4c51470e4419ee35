"""Hugging Face's VideoMAE: its names and its config.json, in both directions.

Written against transformers 5.23; tests/parity compare its outputs with ours. Its versions name the attention
biases in three ways: `q_bias` and `v_bias` (version 4 and all published folders; written here), `query.bias`,
`key.bias` and `value.bias` (5.12, which reads the older names as zeros), and the latter without `key.bias`. A key's
bias shifts all scores of a query equally. Softmax ignores that, so the bias is left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from everest_ds.errors import UserError
from everest_ds.model.transformer import MLP_RATIO
from everest_ds.model.weights.architecture import Architecture, Kind, ModelMetadata, count_blocks, kind_of

TRUNK = "videomae."
# Our module names and theirs, by kind of model; blocks are listed below.
PARTS: dict[Kind, dict[str, str]] = {
    "autoencoder": {
        "encoder.patch_embed.proj": f"{TRUNK}embeddings.patch_embeddings.projection",
        "encoder.norm": f"{TRUNK}layernorm",
    },
    "classifier": {
        "patch_embed.proj": f"{TRUNK}embeddings.patch_embeddings.projection",
        "fc_norm": "fc_norm",
        "head": "classifier",
    },
    "encoder": {
        "patch_embed.proj": f"{TRUNK}embeddings.patch_embeddings.projection",
        "norm": f"{TRUNK}layernorm",
    },
}
ENCODER_BLOCKS, DECODER_BLOCKS = f"{TRUNK}encoder.layer", "decoder.decoder_layers"
# Tensors of a block, in our order. Their names are alternatives: the first is written, any of them is read.
ATTENTION = "attention.attention."
BLOCK_TENSORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "norm1.weight": (("layernorm_before.weight",),),
    "norm1.bias": (("layernorm_before.bias",),),
    "attn.q_bias": ((f"{ATTENTION}q_bias",), (f"{ATTENTION}query.bias",)),
    "attn.v_bias": ((f"{ATTENTION}v_bias",), (f"{ATTENTION}value.bias",)),
    "attn.qkv.weight": ((f"{ATTENTION}query.weight", f"{ATTENTION}key.weight", f"{ATTENTION}value.weight"),),
    "attn.proj.weight": (("attention.output.dense.weight",),),
    "attn.proj.bias": (("attention.output.dense.bias",),),
    "norm2.weight": (("layernorm_after.weight",),),
    "norm2.bias": (("layernorm_after.bias",),),
    "mlp.fc1.weight": (("intermediate.dense.weight",),),
    "mlp.fc1.bias": (("intermediate.dense.bias",),),
    "mlp.fc2.weight": (("output.dense.weight",),),
    "mlp.fc2.bias": (("output.dense.bias",),),
}
DECODER_NAMES = (
    "mask_token",
    "encoder_to_decoder.weight",
    "decoder.norm.weight",
    "decoder.norm.bias",
    "decoder.head.weight",
    "decoder.head.bias",
)
# Settings that have one value in our models; a missing one has transformers' default.
FIXED_SETTINGS: dict[str, Any] = {"model_type": "videomae", "hidden_act": "gelu", "num_channels": 3}
# Epsilon of its decoder's and its classifier's norm; its configuration sets only that of the other norms.
LAST_NORM_EPS = 1e-5
DEFAULT_NORM_EPS = 1e-12
# Numbers of its configuration, with transformers' defaults.
DEFAULT_NUMBERS = {"num_attention_heads": 12, "decoder_num_attention_heads": 6, "num_frames": 16, "tubelet_size": 2}


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Renamed tensors.

    Attributes:
        tensors: By new name; unknown ones keep theirs.
        sources: From new names to the old names that each was made of.
        ignored: Old names of tensors that have no effect.
        notes: What was done besides renaming.
    """

    tensors: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def is_huggingface(names: Mapping[str, Any]) -> bool:
    """Return whether tensors of these names are in its layout."""
    return any(name.startswith((TRUNK, "embeddings.", "encoder.layer.")) for name in names)


def from_huggingface(raw: Mapping[str, Tensor], config: Mapping[str, Any] | None, source: str) -> Translation:
    """Rename tensors of VideoMAEForPreTraining, VideoMAEForVideoClassification or VideoMAEModel.

    Raises:
        UserError: A block lacks its query, key or value, or two names mean the same tensor.
    """
    if not any(name.startswith(TRUNK) for name in raw):  # VideoMAEModel, an encoder alone
        raw = {f"{TRUNK}{name}": tensor for name, tensor in raw.items()}
    kind = kind_of(raw, head="classifier.")
    depths = [count_blocks(raw, stem, source) for stem in (ENCODER_BLOCKS, DECODER_BLOCKS)]
    tensors: dict[str, Tensor] = {}
    sources: dict[str, tuple[str, ...]] = {}
    for ours, choices in _names(kind, *depths).items():
        there = [choice for choice in choices if all(name in raw for name in choice)]
        if len(there) > 1:
            raise UserError(f"{source} has both {there[0][0]} and {there[1][0]}, which mean the same; remove one")
        if there:
            sources[ours] = there[0]
            parts = [raw[name] for name in there[0]]
            tensors[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
        elif len(choices[0]) > 1:
            lacking = [name for name in choices[0] if name not in raw]
            raise UserError(f"{source} lacks {', '.join(lacking)}; expected query, key and value of every block")
    used = {name for names in sources.values() for name in names}
    keys = tuple(name for name in raw if name.endswith(".attention.attention.key.bias"))
    rest = {name: tensor for name, tensor in raw.items() if name not in used and name not in keys}
    notes = ["the keys' biases are ignored: softmax does not depend on them"] if keys else []
    if config is not None and config.get("qv_bias", config.get("qkv_bias")) is False:
        notes.append("its attention has no biases (qv_bias is false); they are zeros here, which is equivalent")
        for name in [name for name in tensors if name.endswith("attn.qkv.weight")]:
            for bias in ("q_bias", "v_bias"):
                ours = name.replace("qkv.weight", bias)
                tensors[ours] = tensors[name].new_zeros(tensors[name].shape[1])
                sources[ours] = ()
    return Translation(tensors=tensors | rest, sources=sources, ignored=keys, notes=tuple(notes))


def to_huggingface(tensors: Mapping[str, Tensor], architecture: Architecture) -> Translation:
    """Rename a complete model's tensors to its names.

    Raises:
        UserError: The embedding has more than one layer; its model has one.
    """
    layers = architecture.options.embedding_layers
    if layers > 1:
        raise UserError(
            f"the tubelet embedding has {layers} layers, Hugging Face's has one; convert to everest instead"
        )
    out: dict[str, Tensor] = {}
    sources: dict[str, tuple[str, ...]] = {}
    for ours, choices in _names(architecture.kind, architecture.depth, architecture.decoder_depth or 0).items():
        theirs = choices[0]
        for name, part in zip(theirs, tensors[ours].chunk(len(theirs)), strict=True):
            out[name] = part.contiguous()
            sources[name] = (ours,)
    notes = [
        "transformers 4 and 5.18 or later read this; 5.12 sets q_bias and v_bias to zero, as it does for all "
        "published folders"
    ]
    if architecture.last_norm_eps != LAST_NORM_EPS:
        whose = "decoder's" if architecture.kind == "autoencoder" else "classifier's"
        notes.append(
            f"its {whose} norm adds {LAST_NORM_EPS:g} to the variance, this model's adds "
            f"{architecture.last_norm_eps:g}; its configuration cannot change that"
        )
    if not architecture.grid_is_known:
        grid, options = architecture.grid, architecture.options
        frames, rows, cols = grid.time * options.tubelet_size, grid.rows, grid.cols
        clip = f"{frames}x{rows * options.patch_size}x{cols * options.patch_size}"
        notes.append(f"the weights do not record their clip size; the official {clip} is assumed")
    return Translation(tensors=out, sources=sources, notes=tuple(notes))


def read_metadata(config: Mapping[str, Any], source: str) -> ModelMetadata:
    """Read a model's metadata from config.json; a folder of ours has more in its block "everest".

    Raises:
        UserError: It is another model, or has a setting that our models do not support.
    """
    for key, expected in FIXED_SETTINGS.items():
        if config.get(key, expected) != expected or (key == "model_type" and key not in config):
            raise UserError(f"{source}: its config.json has {key}={config.get(key)!r}; expected {expected!r}")
    width, hidden = config.get("hidden_size", 768), config.get("intermediate_size", 3072)
    if type(width) is not int or hidden != MLP_RATIO * width:
        raise UserError(f"{source}: intermediate_size={hidden} is not {MLP_RATIO} x hidden_size={width}")
    numbers = {key: config.get(key, default) for key, default in DEFAULT_NUMBERS.items()}
    if not all(type(number) is int and number > 0 for number in numbers.values()):
        raise UserError(f"{source}: its config.json has {numbers}; expected positive integers")
    eps = config.get("layer_norm_eps", DEFAULT_NORM_EPS)
    if not isinstance(eps, int | float) or not 0 < eps < math.inf:
        raise UserError(f"{source}: its config.json has layer_norm_eps={eps!r}; expected a positive number")
    image_size = config.get("image_size", 224)
    edges = [image_size] * 2 if isinstance(image_size, int) else image_size
    if not isinstance(edges, list) or len(edges) != 2 or not all(type(e) is int and e > 0 for e in edges):
        raise UserError(f"{source}: its config.json has image_size={image_size!r}; expected one or two edges")
    metadata = ModelMetadata(
        num_heads=numbers["num_attention_heads"],
        decoder_num_heads=numbers["decoder_num_attention_heads"],
        num_frames=numbers["num_frames"],
        image_height=edges[0],
        image_width=edges[1],
        labels=_read_labels(config.get("id2label")),
        norm_eps=float(eps),
        last_norm_eps=LAST_NORM_EPS,
    )
    block = config.get("everest")
    if block is None:
        return metadata
    try:
        eps, (time, rows, cols) = block["last_norm_eps"], block["position_grid"]
        tubelet, patch = config["tubelet_size"], config["patch_size"]
        if not (type(eps) is float and 0 < eps < math.inf) or min(time, rows, cols) < 1:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{source}: the block everest of config.json was not written by `everest convert`"
        ) from error
    sizes = {"num_frames": time * tubelet, "image_height": rows * patch, "image_width": cols * patch}
    return replace(metadata, **sizes, last_norm_eps=eps)


def _read_labels(labels: Any) -> tuple[str, ...] | None:
    """Return the names of classes; None if they are transformers' placeholders."""
    if not isinstance(labels, dict) or not all(str(i) in labels for i in range(len(labels))):
        return None
    names = tuple(str(labels[str(i)]) for i in range(len(labels)))
    return None if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


def notes_of_config(config: Mapping[str, Any], kind: Kind) -> tuple[str, ...]:
    """Return notes on what transformers' model computes differently with the same weights.

    Raises:
        UserError: Its classifier reads the first token instead of the mean of all.
    """
    if kind == "classifier" and not config.get("use_mean_pooling", True):
        raise UserError(
            "its classifier reads the first token (use_mean_pooling is false); expected the mean of all"
        )
    if kind == "autoencoder" and not config.get("norm_pix_loss", True):
        return ("its decoder predicts plain pixels (norm_pix_loss is false), ours predicts standardised ones",)
    return ()


def _names(kind: Kind, depth: int, decoder_depth: int) -> dict[str, Sequence[tuple[str, ...]]]:
    """Return, for each of our names, the alternative lists of their names."""
    names: dict[str, Sequence[tuple[str, ...]]] = {
        f"{ours}.{leaf}": [(f"{theirs}.{leaf}",)]
        for ours, theirs in PARTS[kind].items()
        for leaf in ("weight", "bias")
    }
    stacks = [("encoder.blocks" if kind == "autoencoder" else "blocks", ENCODER_BLOCKS, depth)]
    if kind == "autoencoder":
        names |= {name: [(name,)] for name in DECODER_NAMES}
        stacks.append(("decoder.blocks", DECODER_BLOCKS, decoder_depth))
    for ours, theirs, count in stacks:
        for i in range(count):
            for leaf, choices in BLOCK_TENSORS.items():
                names[f"{ours}.{i}.{leaf}"] = [tuple(f"{theirs}.{i}.{name}" for name in parts) for parts in choices]
    return names
