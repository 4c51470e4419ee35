"""Weights of other projects: mmaction2's VideoMAE is read, other known models are refused by name.

Place in the flow: tensors under a file's own names, without prefixes -> our names (mmaction2), or an error that
names the model instead of listing its tensors.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from everest_ds.errors import UserError
from everest_ds.model.tubelets import sinusoid_positions
from everest_ds.model.weights.huggingface import Translation
from everest_ds.tokens import TokenGrid

# mmaction2's names that differ from the official ones.
MMACTION_NAMES = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^(blocks\.\d+\.mlp)\.layers\.0\.0\.", r"\1.fc1."),
    (r"^(blocks\.\d+\.mlp)\.layers\.1\.", r"\1.fc2."),
    (r"^cls_head\.fc_cls\.", "head."),
)
MMACTION_MARKS = (r"patch_embed\.projection\.weight", r"blocks\.\d+\.mlp\.layers\.0\.0\.weight")
MMACTION_EXTRA = ("data_preprocessor.",)  # the mean and deviation of its pixels
POSITIONS = "pos_embed"
# Rounding of a table of positions that is stored in half precision.
POSITION_TOLERANCE = 1e-3

Names = Mapping[str, Tensor]


def is_mmaction(names: Names) -> bool:
    """Return whether tensors of these names are mmaction2's VideoMAE (its `VisionTransformer` of vit_mae)."""
    return all(any(re.fullmatch(mark, name) for name in names) for mark in MMACTION_MARKS)


def from_mmaction(raw: Names, source: str) -> Translation:
    """Rename mmaction2's tensors, without their prefix ``backbone.``.

    Raises:
        UserError: Its positions are trained, or the classifier reads one token instead of the mean of all.
    """
    tensors: dict[str, Tensor] = {}
    sources: dict[str, tuple[str, ...]] = {}
    ignored, notes = [], []
    for name, tensor in raw.items():
        if name == POSITIONS:
            _require_sinusoids(tensor, source)
            notes.append(f"its positions are fixed sinusoids of {tensor.shape[1]} tokens; they are computed here")
        if name == POSITIONS or name.startswith(MMACTION_EXTRA):
            ignored.append(name)
            continue
        ours = name
        for theirs, replacement in MMACTION_NAMES:
            ours = re.sub(theirs, replacement, ours)
        tensors[ours] = tensor
        sources[ours] = (name,)
    if "head.weight" in tensors and "norm.weight" in tensors:
        raise UserError(
            f"{source}: mmaction2's classifier reads the first token (use_mean_pooling is false); expected the "
            "mean of all"
        )
    return Translation(tensors=tensors, sources=sources, ignored=tuple(ignored), notes=tuple(notes))


def _require_sinusoids(positions_1ND: Tensor, source: str) -> None:
    """Refuse trained positions: ours are fixed sinusoids, like mmaction2's default."""
    if positions_1ND.ndim == 3:
        _, count, width = positions_1ND.shape
        expected_ND = sinusoid_positions(TokenGrid(time=1, rows=1, cols=count), width)
        if float((positions_1ND[0].float() - expected_ND).abs().max()) < POSITION_TOLERANCE:
            return
    raise UserError(f"{source}: its positions ({POSITIONS}) are trained; expected fixed sinusoids")


def refuse_other_models(raw: Names, config: Mapping[str, Any] | None, source: str) -> None:
    """Refuse weights of a known model that is not VideoMAE.

    Args:
        raw: Tensors under the file's names, without prefixes.
        config: The config.json of a Hugging Face folder.
        source: Their path, for errors.

    Raises:
        UserError: It is another model, which the message names.
    """
    model_type = "videomae" if config is None else config.get("model_type", "videomae")
    if model_type != "videomae" and not any(name.startswith("videomae.") for name in raw):
        what: str | None = f"a Hugging Face model of type {model_type!r}"
    else:
        what = next((model for model, matches in OTHERS if matches(raw)), None)
        image = _image_embedding(raw)
        if what is None and image is not None:
            what = (
                f"an image model: its patch embedding {image} has shape {tuple(raw[image].shape)}, without an axis "
                "for time"
            )
        if what is None and _has(ONE_BIAS)(raw):
            what = "V-JEPA or another vision transformer with one bias for queries, keys and values (attn.qkv.bias)"
    if what is not None:
        raise UserError(
            f"{source} is {what}; expected a run, or VideoMAE or EVEREST weights in the layout of the official "
            "code, mmaction2 or Hugging Face"
        )


def _has(*patterns: str, images: bool = False) -> Callable[[Names], bool]:
    """Return a test: each pattern is found in some name and, with ``images``, the patch embedding is 2-D."""
    return lambda raw: (
        all(any(re.search(pattern, name) for name in raw) for pattern in patterns)
        and not (images and _image_embedding(raw) is None)
    )


def _image_embedding(raw: Names) -> str | None:
    """Return the name of a two-dimensional patch embedding; None where there is none."""
    names = (name for name, tensor in raw.items() if tensor.ndim == 4 and re.search(PATCH_EMBEDDING, name))
    return next(names, None)


PATCH_EMBEDDING = r"patch_embed\w*\.(\w+\.)*weight$"
# Models that are recognised by their tensor names, more specific patterns first.
OTHERS: tuple[tuple[str, Callable[[Names], bool]], ...] = (
    (
        "a masked autoencoder of images (MAE): its patch embedding is 2-D",
        _has(r"^decoder_(embed|blocks|pred)\.", images=True),
    ),
    ("an image model of DINOv2's kind: its patch embedding is 2-D", _has(r"\.ls1\.gamma$", images=True)),
    ("TimeSformer: its blocks attend to time and space separately", _has(r"temporal_(attn|fc|attention|norm)")),
    ("CLIP or a model built on it", _has(r"(resblocks\.|vision_model\.)", r"(conv1|patch_embedding)\.weight$")),
    ("InternVideo2: its blocks scale their branches", _has(r"blocks\.\d+\.ls1\.gamma$")),
    (
        "MAE-ST: it has trained positions, separate for time and space",
        _has(r"pos_embed_temporal$", r"\.attn\.q\.weight$"),
    ),
    (
        "MViT or Hiera: its blocks pool their tokens",
        _has(r"(attn\.(pool|norm)_[qkv]\.|rel_pos_[htw]$|pos_embed_spatial$)"),
    ),
    ("a Swin transformer: its blocks attend in windows", _has(r"relative_position_bias_table$")),
    ("UniFormer: its first blocks are convolutions", _has(r"^blocks1\.\d+\.", r"^blocks2\.\d+\.")),
    ("a convolutional network", _has(r"(^|\.)layer1\.\d+\.conv1\.")),
)
# Checked last, because image models have it too.
ONE_BIAS = r"^blocks\.\d+\.attn\.qkv\.bias$"
