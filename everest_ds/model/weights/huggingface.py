"""Hugging Face's VideoMAE: its names and its config.json, in both directions.

Written against transformers 5.23; what it computes is compared with ours in tests/parity. Its versions keep the
attention biases in three ways: `q_bias` and `v_bias` (version 4 and all published folders; what is written here),
`query.bias`, `key.bias` and `value.bias` (5.12, which reads the older names as zeros), and without `key.bias`. A
key's bias shifts all scores of a query alike, so softmax ignores it and it is left out.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from everest_ds.errors import UserError
from everest_ds.model.transformer import MLP_RATIO, Block
from everest_ds.model.weights.architecture import Architecture, Kind, ModelMetadata, count_blocks

TRUNK = "videomae."
ENCODER_BLOCKS, DECODER_BLOCKS = f"{TRUNK}encoder.layer", "decoder.decoder_layers"
# Parts of a block that only differ in name; the rest is attention's input, see `_block_sources`.
BLOCK_PARTS = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
ENCODER_PARTS = {"patch_embed.proj": f"{TRUNK}embeddings.patch_embeddings.projection"}
HEAD_PARTS = {"fc_norm": "fc_norm", "head": "classifier"}
NORM_PARTS = {"encoder.norm": f"{TRUNK}layernorm"}
DECODER_NAMES = (
    "mask_token",
    "encoder_to_decoder.weight",
    "decoder.norm.weight",
    "decoder.norm.bias",
    "decoder.head.weight",
    "decoder.head.bias",
)
# Settings of its configuration that our models have one value of; absent ones have transformers' default.
FIXED_SETTINGS: dict[str, Any] = {"model_type": "videomae", "hidden_act": "gelu", "num_channels": 3}
# What its decoder's and its classifier's norm add to the variance, whatever its configuration says of the others.
LAST_NORM_EPS = 1e-5
DEFAULT_NORM_EPS = 1e-12
# Its numbers that `ModelMetadata` take, with transformers' defaults.
DEFAULT_NUMBERS = {"num_attention_heads": 12, "decoder_num_attention_heads": 6, "num_frames": 16, "tubelet_size": 2}


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Tensors under our names.

    Attributes:
        tensors: By our name; what has none keeps its own.
        sources: The names that each was made of.
        ignored: Names that carry nothing.
        notes: What was done that is not plain renaming.
    """

    tensors: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def is_huggingface(names: Mapping[str, Any]) -> bool:
    """Return whether tensors of these names are in its layout."""
    return any(name.startswith((TRUNK, "embeddings.", "encoder.layer.")) for name in names)


def from_huggingface(raw: Mapping[str, Tensor], config: Mapping[str, Any] | None, source: str) -> Translation:
    """Bring tensors of its layout under our names.

    Args:
        raw: Tensors under its names, of VideoMAEForPreTraining, VideoMAEForVideoClassification or VideoMAEModel.
        config: Its config.json, if there is one.
        source: Where they are from, for errors.

    Raises:
        UserError: Query, key and value of a block are not all there, or two names mean one tensor.
    """
    if not any(name.startswith(TRUNK) for name in raw):  # VideoMAEModel, the encoder alone
        raw = {f"{TRUNK}{name}": tensor for name, tensor in raw.items()}
    kind = _kind(raw)
    tensors: dict[str, Tensor] = {}
    sources: dict[str, tuple[str, ...]] = {}
    for ours, choices in _names(kind, count_blocks(raw, ENCODER_BLOCKS), count_blocks(raw, DECODER_BLOCKS)).items():
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
    notes = ["the keys' biases shift all scores of a query alike and change nothing"] if keys else []
    if config is not None and config.get("qv_bias", config.get("qkv_bias")) is False:
        notes.append("its attention has no biases (qv_bias is false): zeros here, which is the same")
        for name in [name for name in tensors if name.endswith("attn.qkv.weight")]:
            for bias in ("q_bias", "v_bias"):
                ours = name.replace("qkv.weight", bias)
                tensors[ours] = tensors[name].new_zeros(tensors[name].shape[1])
                sources[ours] = ()
    return Translation(tensors=tensors | rest, sources=sources, ignored=keys, notes=tuple(notes))


def to_huggingface(tensors: Mapping[str, Tensor], architecture: Architecture) -> Translation:
    """Bring a complete model's tensors under its names; ``sources`` are ours here.

    Raises:
        UserError: The embedding has more than one layer, which its model has not.
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
        "transformers 4 and 5.18 or later read this; 5.12 leaves q_bias and v_bias at zero, as it does in all "
        "published folders"
    ]
    if architecture.last_norm_eps != LAST_NORM_EPS:
        whose = "decoder's" if architecture.kind == "autoencoder" else "classifier's"
        notes.append(
            f"its {whose} norm adds {LAST_NORM_EPS:g} to the variance where this model adds "
            f"{architecture.last_norm_eps:g}; nothing in its configuration changes that"
        )
    if not architecture.grid_is_known:
        grid, options = architecture.grid, architecture.options
        frames, rows, cols = grid.time * options.tubelet_size, grid.rows, grid.cols
        clip = f"{frames}x{rows * options.patch_size}x{cols * options.patch_size}"
        notes.append(f"the weights do not say for which clips; taken as {clip}, the official ones")
    return Translation(tensors=out, sources=sources, notes=tuple(notes))


def facts_of_config(config: Mapping[str, Any], source: str) -> ModelMetadata:
    """Read what its configuration says and shapes do not.

    Raises:
        UserError: Another model, or a setting that our models do not have.
    """
    for key, expected in FIXED_SETTINGS.items():
        if config.get(key, expected) != expected or (key == "model_type" and key not in config):
            raise UserError(f"{source}: its config.json has {key}={config.get(key)!r}; expected {expected!r}")
    width, hidden = config.get("hidden_size", 768), config.get("intermediate_size", 3072)
    if hidden != MLP_RATIO * width:
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
    labels = config.get("id2label")
    named = None
    if isinstance(labels, dict) and all(str(i) in labels for i in range(len(labels))):
        ordered = tuple(str(labels[str(i)]) for i in range(len(labels)))
        named = None if ordered == tuple(f"LABEL_{i}" for i in range(len(ordered))) else ordered
    facts = ModelMetadata(
        num_heads=numbers["num_attention_heads"],
        decoder_num_heads=numbers["decoder_num_attention_heads"],
        num_frames=numbers["num_frames"],
        image_height=edges[0],
        image_width=edges[1],
        labels=named,
        norm_eps=float(eps),
        last_norm_eps=LAST_NORM_EPS,
    )
    return _facts_of_export(facts, config, source)


def _facts_of_export(facts: ModelMetadata, config: Mapping[str, Any], source: str) -> ModelMetadata:
    """Return the facts with what a folder of ours says of them: the last norm, and the clips that positions are of.

    Raises:
        UserError: Its block of config.json is not what `everest convert` writes.
    """
    block = config.get("everest")
    if block is None:
        return facts
    try:
        eps, (time, rows, cols) = block["last_norm_eps"], block["position_grid"]
        tubelet, patch = config["tubelet_size"], config["patch_size"]
        if not (type(eps) is float and 0 < eps < math.inf) or min(time, rows, cols) < 1:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{source}: the block everest of config.json is not what `everest convert` writes"
        ) from error
    sizes = {"num_frames": time * tubelet, "image_height": rows * patch, "image_width": cols * patch}
    return replace(facts, **sizes, last_norm_eps=eps)


def notes_of_config(config: Mapping[str, Any], kind: Kind) -> list[str]:
    """Return where its model computes something else with the same weights.

    Raises:
        UserError: A classifier that reads the first token instead of the mean.
    """
    notes = []
    if kind == "autoencoder" and not config.get("norm_pix_loss", True):
        notes.append("its decoder predicts plain pixels (norm_pix_loss is false), ours standardised ones")
    if kind == "classifier" and not config.get("use_mean_pooling", True):
        raise UserError("its classifier reads the first token (use_mean_pooling is false), ours the mean of all")
    return notes


def _kind(raw: Mapping[str, Any]) -> Kind:
    if any(name.startswith(("decoder.", "encoder_to_decoder.", "mask_token")) for name in raw):
        return "autoencoder"
    return "classifier" if any(name.startswith(("classifier.", "fc_norm.")) for name in raw) else "encoder"


def _names(kind: Kind, depth: int, decoder_depth: int) -> dict[str, list[tuple[str, ...]]]:
    """Return, for each of our names, the names of theirs that it may be made of; the first choice is written."""
    trunk = "encoder." if kind == "autoencoder" else ""
    parts = {f"{trunk}{ours}": theirs for ours, theirs in ENCODER_PARTS.items()}
    if kind == "autoencoder":
        parts |= NORM_PARTS
    elif kind == "encoder":
        parts |= {"norm": f"{TRUNK}layernorm"}
    else:
        parts |= HEAD_PARTS
    names: dict[str, list[tuple[str, ...]]] = {
        f"{ours}.{leaf}": [(f"{theirs}.{leaf}",)] for ours, theirs in parts.items() for leaf in ("weight", "bias")
    }
    stacks = [(f"{trunk}blocks", ENCODER_BLOCKS, depth)]
    if kind == "autoencoder":
        names |= {name: [(name,)] for name in DECODER_NAMES}
        stacks.append(("decoder.blocks", DECODER_BLOCKS, decoder_depth))
    with torch.device("meta"):
        leaves = list(Block(1, 1, backend="auto").state_dict())
    for ours, theirs, count in stacks:
        for i in range(count):
            names |= {f"{ours}.{i}.{leaf}": _block_sources(f"{theirs}.{i}.", leaf) for leaf in leaves}
    return names


def _block_sources(stem: str, leaf: str) -> list[tuple[str, ...]]:
    attention = f"{stem}attention.attention."
    if leaf == "attn.qkv.weight":
        return [tuple(f"{attention}{part}.weight" for part in ("query", "key", "value"))]
    bias = re.fullmatch(r"attn\.([qv])_bias", leaf)
    if bias:
        newer = {"q": "query.bias", "v": "value.bias"}[bias[1]]
        return [(f"{attention}{bias[1]}_bias",), (f"{attention}{newer}",)]
    part, _, kind = leaf.rpartition(".")
    return [(f"{stem}{BLOCK_PARTS[part]}.{kind}",)]
