"""Which model a set of weights belongs to, inferred from names, shapes and metadata.

Place in the flow: `foreign` and `huggingface` rename tensors to our names. This module infers their model and can
build it. `loading` loads them.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everest_ds.errors import UserError, escaped
from everest_ds.files import parse_json
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.selection import SelectionRule
from everest_ds.model.sizes import SIZES, ModelSize
from everest_ds.model.transformer import NORM_EPS
from everest_ds.tokens import TokenGrid

# Limits on what foreign files may claim, far above every published model.
MAX_BLOCKS, MAX_TOKENS = 1000, 2**17
COUNTS = ("num_heads", "decoder_num_heads", "num_frames", "image_height", "image_width")
EPSILONS = ("norm_eps", "last_norm_eps")


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """Properties of a model that its tensors do not show; None where unknown.

    Attributes:
        num_heads: Attention heads of the encoder.
        decoder_num_heads: Attention heads of the decoder.
        num_frames: Frames of the clips that positions are computed for. All of frames, height and width, or none.
        image_height: Height of those clips in pixels.
        image_width: Width of those clips in pixels.
        labels: Names of the classes, in the head's order.
        norm_eps: What the norms add to the variance.
        last_norm_eps: The same for the decoder's or the classifier's norm, where Hugging Face has another value.
    """

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    num_frames: int | None = None
    image_height: int | None = None
    image_width: int | None = None
    labels: tuple[str, ...] | None = None
    norm_eps: float | None = None
    last_norm_eps: float | None = None

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: Any, source: str) -> "ModelMetadata":
        """Read what `dump` wrote.

        Raises:
            UserError: The text is something else.
        """
        try:
            raw = parse_json(text)
            counts, epsilons = ({name: raw[name] for name in names} for names in (COUNTS, EPSILONS))
            labels = raw["labels"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{source}: its model metadata was not written by `everest convert`") from error
        for kind, numbers in ((int, counts), (float, epsilons)):
            if not all(v is None or (type(v) is kind and 0 < v < math.inf) for v in numbers.values()):
                raise UserError(f"{source}: its model metadata has {numbers}; expected positive numbers")
        names = tuple(str(label) for label in labels) if isinstance(labels, list) else None
        return cls(**counts, **epsilons, labels=names)


NO_METADATA = ModelMetadata()
KEEP_ALL = SelectionRule(selected_ratio=1)

Kind = Literal["autoencoder", "classifier", "encoder"]
DESCRIPTIONS: dict[Kind, str] = {
    "autoencoder": "a pre-training model",
    "classifier": "a classifier",
    "encoder": "an encoder alone",
}
# The clips of the official code; its files do not record them.
OFFICIAL_NUM_FRAMES, OFFICIAL_IMAGE_SIZE = 16, 224
HEAD_WIDTH = 64  # channels of a head in the official models, except in huge
LAST_NORMS = ("decoder.norm", "fc_norm")
DECODER_MARKS = ("decoder.", "encoder_to_decoder.", "mask_token")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The model that weights belong to.

    Attributes:
        num_heads: None where unknown; ``decoder_num_heads`` likewise.
        heads_are_known: Whether the weights came with the number of heads; else it is guessed from their width.
        grid: The tokens that positions are computed for.
        grid_is_known: Whether the weights came with that grid; else the official 16 x 224 x 224 is assumed.
        labels: Names of the classes.
        norm_eps: What the norms add to the variance.
        last_norm_eps: The same for the decoder's or the classifier's norm.
    """

    kind: Kind
    width: int
    depth: int
    num_heads: int | None
    heads_are_known: bool
    options: EncoderOptions
    grid: TokenGrid
    grid_is_known: bool
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None
    num_classes: int | None = None
    labels: tuple[str, ...] | None = None
    norm_eps: float = NORM_EPS
    last_norm_eps: float = NORM_EPS

    def describe(self) -> str:
        """Return the model in one line."""
        options = self.options
        parts = [
            f"{DESCRIPTIONS[self.kind]}, {name_of_size(self.width, self.depth)}",
            f"tubelets {options.tubelet_size}x{options.patch_size}x{options.patch_size}",
        ]
        if self.kind == "autoencoder":
            parts.append(f"decoder {self.decoder_width} wide, {self.decoder_depth} blocks")
        if self.kind == "classifier":
            parts.append(f"{self.num_classes} classes")
        return ", ".join(parts)

    def metadata(self) -> ModelMetadata:
        """Return the properties that the tensors of this model do not show."""
        options, grid = self.options, self.grid
        known = self.grid_is_known
        return ModelMetadata(
            num_heads=self.num_heads,
            decoder_num_heads=self.decoder_num_heads,
            num_frames=grid.time * options.tubelet_size if known else None,
            image_height=grid.rows * options.patch_size if known else None,
            image_width=grid.cols * options.patch_size if known else None,
            labels=self.labels,
            norm_eps=self.norm_eps,
            last_norm_eps=self.last_norm_eps,
        )

    def size(self) -> ModelSize:
        """Return width, depth and heads of both parts; a classifier gets the decoder of the size with its width.

        Raises:
            UserError: The number of heads is unknown.
        """
        if self.num_heads is None or (self.kind == "autoencoder" and self.decoder_num_heads is None):
            raise UserError(
                f"the number of attention heads is unknown for width {self.width} (decoder {self.decoder_width}); "
                "convert from a run, a Hugging Face folder or a file of `everest convert`, which record it"
            )
        return ModelSize(
            width=self.width,
            depth=self.depth,
            num_heads=self.num_heads,
            decoder_width=self.decoder_width or self.width // 2,
            decoder_num_heads=self.decoder_num_heads or max(1, self.num_heads // 2),
        )

    def build(self, rule: SelectionRule = KEEP_ALL) -> EverestAutoencoder | EverestClassifier:
        """Return a freshly initialised model with the positions and norms of the weights.

        A classifier keeps the tokens of ``rule``.

        Raises:
            UserError: The number of heads is unknown, or this is an encoder alone.
        """
        model: EverestAutoencoder | EverestClassifier
        size = self.size()
        if self.kind == "autoencoder":
            model = EverestAutoencoder(size, self.grid, self.options, decoder_depth=self.decoder_depth or 0)
        elif self.kind == "classifier":
            classes = self.num_classes or 0
            model = EverestClassifier(size, self.grid, self.options, num_classes=classes, rule=rule)
        else:
            raise UserError(
                "these weights are an encoder alone, neither a pre-training model nor a classifier; start a run "
                "from them with --init-from"
            )
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = self.last_norm_eps if name in LAST_NORMS else self.norm_eps
        return model

    @cached_property
    def expected_shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of a complete model, for any number of heads.

        Raises:
            UserError: This is an encoder alone.
        """
        with torch.device("meta"):
            model = replace(self, num_heads=1, decoder_num_heads=1).build()
        return {name: tensor.shape for name, tensor in model.state_dict().items()}


def infer_architecture(tensors: Mapping[str, Tensor], metadata: ModelMetadata, source: str) -> Architecture:
    """Infer an architecture from tensors under our names; some may be missing.

    Raises:
        UserError: No known model has such tensors; the message begins with ``source``.
    """
    kind = kind_of(tensors)
    trunk = "encoder." if kind == "autoencoder" else ""
    depth = count_blocks(tensors, f"{trunk}blocks", source)
    kernels = _kernels(tensors, f"{trunk}patch_embed.", source)
    if not depth:
        known = ", ".join(escaped(name) for name in sorted(tensors)[:4])
        raise UserError(
            f"{source} has no weights in a known layout: it has {known or 'no tensors'}; expected the official "
            "names (encoder.blocks.0..., blocks.0...) or Hugging Face's (videomae.encoder.layer.0...)"
        )
    if not kernels:
        raise UserError(
            f"{source} lacks {trunk}patch_embed.proj.weight with five axes, or an embedding layer before it"
        )
    width = tensors[f"{trunk}patch_embed.proj.weight"].shape[0]
    patch_size = math.prod(kernel[1] for kernel in kernels)
    options = EncoderOptions(tubelet_size=kernels[0][0], patch_size=patch_size, embedding_layers=len(kernels))
    decoder_width = _decoder_width(tensors) if kind == "autoencoder" else None
    for heads, channels in ((metadata.num_heads, width), (metadata.decoder_num_heads, decoder_width)):
        if heads and channels and channels % heads:
            raise UserError(f"{source}: {channels} channels are not divisible by {heads} attention heads")
    head = tensors.get("head.weight", tensors.get("head.bias"))
    return Architecture(
        kind=kind,
        width=width,
        depth=depth,
        num_heads=metadata.num_heads or heads_of_width(width),
        heads_are_known=metadata.num_heads is not None,
        options=options,
        grid=_grid(metadata, options, source),
        grid_is_known=None not in (metadata.num_frames, metadata.image_height, metadata.image_width),
        decoder_width=decoder_width,
        decoder_depth=count_blocks(tensors, "decoder.blocks", source) if kind == "autoencoder" else None,
        decoder_num_heads=(metadata.decoder_num_heads or heads_of_width(decoder_width)) if decoder_width else None,
        num_classes=head.shape[0] if kind == "classifier" and head is not None else None,
        labels=metadata.labels,
        norm_eps=metadata.norm_eps or NORM_EPS,
        last_norm_eps=metadata.last_norm_eps or NORM_EPS,
    )


def kind_of(names: Iterable[str], head: str = "head.") -> Kind:
    """Return the kind of model that has these tensor names."""
    if any(name.startswith(DECODER_MARKS) for name in names):
        return "autoencoder"
    return "classifier" if any(name.startswith((head, "fc_norm.")) for name in names) else "encoder"


def count_blocks(names: Iterable[str], stem: str, source: str) -> int:
    """Return how many blocks there are: the highest block number plus one.

    Raises:
        UserError: There are too many blocks, or fewer tensors than blocks.
    """
    found = [re.match(rf"{re.escape(stem)}\.([0-9]+)\.", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    count = max(numbers, default=-1) + 1
    if count > min(len(numbers), MAX_BLOCKS):
        raise UserError(
            f"{source} has {len(numbers)} tensors in {stem} and a block numbered {count - 1}; expected at least "
            f"one tensor in each block, and at most {MAX_BLOCKS} blocks"
        )
    return count


def require_size(grid: TokenGrid, source: str) -> TokenGrid:
    """Return a grid from foreign metadata; refuse an absurdly large one, whose positions would fill the memory."""
    if grid.num_tokens > MAX_TOKENS:
        raise UserError(f"{source}: its clips have {grid.num_tokens} tokens; expected at most {MAX_TOKENS}")
    return grid


def heads_of_width(width: int) -> int | None:
    """Return the heads of the named model of this width, else one head per 64 channels, else None."""
    for size in SIZES.values():
        if width == size.width:
            return size.num_heads
        if width == size.decoder_width:
            return size.decoder_num_heads
    return width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else None


def name_of_size(width: int, depth: int) -> str:
    """Return width and depth in words, after the name of the size that has both."""
    named = [f"ViT-{name}, " for name, size in SIZES.items() if (size.width, size.depth) == (width, depth)]
    return f"{''.join(named)}width {width}, {depth} blocks"


def _kernels(tensors: Mapping[str, Tensor], prefix: str, source: str) -> list[tuple[int, ...]]:
    """Return the kernels of the embedding's layers, (frames, rows, columns), or an empty list."""
    names = [f"{prefix}stem.{i}.weight" for i in range(count_blocks(tensors, f"{prefix}stem", source))]
    weights = [tensors.get(name) for name in [*names, f"{prefix}proj.weight"]]
    if any(weight is None or weight.ndim != 5 for weight in weights):
        return []
    return [tuple(weight.shape[2:]) for weight in weights if weight is not None]


def _decoder_width(tensors: Mapping[str, Tensor]) -> int | None:
    for name, axis in (("mask_token", -1), ("encoder_to_decoder.weight", 0), ("decoder.norm.weight", 0)):
        if name in tensors and tensors[name].ndim:
            return tensors[name].shape[axis]
    return None


def _grid(metadata: ModelMetadata, options: EncoderOptions, source: str) -> TokenGrid:
    tubelet, patch = options.tubelet_size, options.patch_size
    if metadata.num_frames is None or metadata.image_height is None or metadata.image_width is None:
        edge = max(1, OFFICIAL_IMAGE_SIZE // patch)
        return TokenGrid(time=max(1, OFFICIAL_NUM_FRAMES // tubelet), rows=edge, cols=edge)
    try:
        grid = TokenGrid.of_clip(
            num_frames=metadata.num_frames,
            height=metadata.image_height,
            width=metadata.image_width,
            tubelet_size=tubelet,
            patch_size=patch,
        )
    except UserError as error:
        raise UserError(f"{source}: the clip size of these weights does not fit their tubelets: {error}") from error
    return require_size(grid, source)
