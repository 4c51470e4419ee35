from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch

import everest_ds.model.registry  # noqa: F401  (registers the models)
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier

# Parameter counts: official ones from the golden key list; S, L and H by hand from widths and depths.
SIZES = {"small": (384, 12, 192), "base": (768, 12, 384), "large": (1024, 24, 512), "huge": (1280, 32, 640)}


def count_block(width: int) -> int:
    """Return the parameters of a block: two norms, qkv with two biases, projection, MLP."""
    return 4 * width + (3 * width * width + 2 * width) + (width * width + width) + (8 * width * width + 5 * width)


@pytest.mark.parametrize("size", sorted(SIZES))
def test_autoencoder_of_every_size_has_the_parameters_of_its_shape(size: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"everest_pretrain_vit_{size}_patch16_224")
    assert isinstance(model, EverestAutoencoder)
    width, depth, narrow = SIZES[size]
    expected = 1536 * width + width + depth * count_block(width) + 2 * width
    expected += width * narrow + narrow + 4 * count_block(narrow) + 2 * narrow + narrow * 1536 + 1536
    assert sum(p.numel() for p in model.parameters()) == expected


def test_keys_and_shapes_are_the_official_ones(golden_json: Callable[[str], Any]) -> None:
    official = golden_json("checkpoint_keys_vit_base")
    with torch.device("meta"):
        pretrain = timm.create_model("everest_pretrain_vit_base_patch16_224")
        finetune = timm.create_model("everest_vit_base_patch16_224", num_classes=400)
    for model, key in ((pretrain, "pretrain_vit_base_dd4"), (finetune, "finetune_vit_base_400")):
        assert {name: list(value.shape) for name, value in model.state_dict().items()} == official[key]


def test_options_reach_the_model() -> None:
    with torch.device("meta"):
        model = timm.create_model("everest_vit_small_patch16_224", num_classes=7, num_frames=24, keep_ratio=0.5)
    assert isinstance(model, EverestClassifier)
    assert (model.num_classes, model.grid.time, model.rule.selected_ratio) == (7, 12, 0.5)


def test_pretrained_weights_and_unknown_options_are_refused() -> None:
    with pytest.raises((ValueError, RuntimeError), match="pretrained"):
        timm.create_model("everest_vit_small_patch16_224", pretrained=True)
    with pytest.raises(TypeError, match="nun_frames"):
        timm.create_model("everest_vit_small_patch16_224", nun_frames=8)
