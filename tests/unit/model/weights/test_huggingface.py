"""Hugging Face's names and configuration, without its package; tests/parity compares the outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from everest_ds.errors import UserError
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.weights.architecture import ModelMetadata
from everest_ds.model.weights.export import write_weights
from everest_ds.model.weights.loading import load_weights
from everest_ds.model.weights.reading import Weights, read_weights, require_complete, weights_of_run
from everest_ds.tokens import TokenGrid
from tests.conftest import GOLDEN, make_size

KEYS = json.loads((GOLDEN / "checkpoint_keys_vit_base.json").read_text())
KEY_MAP = json.loads((GOLDEN / "hf_key_map_vit_base.json").read_text())["map"]
GRID = TokenGrid(time=2, rows=2, cols=3)
METADATA = ModelMetadata(num_heads=2, decoder_num_heads=2, num_frames=4, image_height=32, image_width=48)


def our_weights(kind: str, metadata: ModelMetadata = METADATA) -> Weights:
    torch.manual_seed(0)
    model = {
        "autoencoder": lambda: EverestAutoencoder(make_size(), GRID, decoder_depth=2),
        "classifier": lambda: EverestClassifier(make_size(), GRID, num_classes=3),
    }[kind]()
    return weights_of_run(
        {name: torch.randn(t.shape) for name, t in model.state_dict().items()}, metadata, "memory"
    )


def folder_of(
    kind: str, path: Path, metadata: ModelMetadata = METADATA
) -> tuple[Weights, dict[str, Tensor], dict[str, Any]]:
    weights = our_weights(kind, metadata)
    write_weights(weights, path, "hf")
    return weights, load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())


def rewrite(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", sorted(KEY_MAP))
def test_names_are_those_of_the_converter(name: str, tmp_path: Path) -> None:
    """The golden map was read from the converter independently; tensors are matched by value."""
    official = {key: torch.randn(1).expand(shape).contiguous() for key, shape in KEYS[name].items()}
    weights = weights_of_run(official, ModelMetadata(), "memory")
    write_weights(weights, tmp_path / "hf", "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    expected = {}
    for ours, theirs in KEY_MAP[name].items():
        names = [theirs] if isinstance(theirs, str) else theirs
        expected |= dict(zip(names, official[ours].chunk(len(names)), strict=True))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["autoencoder", "classifier"])
@pytest.mark.parametrize("style", ["q_bias", "query.bias", "key.bias"])
def test_every_layout_of_the_biases_is_read_bit_for_bit(kind: str, style: str, tmp_path: Path) -> None:
    weights, tensors, config = folder_of(kind, tmp_path / "hf")
    if style != "q_bias":
        tensors = {n.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): t for n, t in tensors.items()}
    if style == "key.bias":
        tensors |= {
            n.replace("query", "key"): torch.randn(t.shape) for n, t in tensors.items() if "query.bias" in n
        }
    rewrite(tmp_path / "hf", tensors, config)
    back, report = require_complete(read_weights(tmp_path / "hf"))
    assert back.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(back.tensors[name], weights.tensors[name]) for name in weights.tensors)
    assert back.architecture == replace(weights.architecture, last_norm_eps=1e-5)
    key_biases = {name for name in tensors if name.endswith("key.bias")}
    assert {*report.ignored} == key_biases
    notes = ["the keys' biases are ignored: softmax does not depend on them"] if key_biases else []
    assert list(report.notes) == notes


def test_two_layouts_of_a_bias_at_once_are_refused(tmp_path: Path) -> None:
    _, tensors, config = folder_of("classifier", tmp_path / "hf")
    stem = "videomae.encoder.layer.0.attention.attention."
    rewrite(tmp_path / "hf", {**tensors, f"{stem}query.bias": torch.zeros(32)}, config)
    with pytest.raises(UserError, match=r"has both .*\.q_bias and .*\.query\.bias, which mean the same"):
        read_weights(tmp_path / "hf")


def test_attention_without_biases_has_zeros(tmp_path: Path) -> None:
    _, tensors, config = folder_of("classifier", tmp_path / "hf")
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith(("q_bias", "v_bias"))}
    rewrite(tmp_path / "hf", without, config)
    with pytest.raises(UserError, match=r"lacks blocks\.0\.attn\.q_bias"):
        require_complete(read_weights(tmp_path / "hf"))
    rewrite(tmp_path / "hf", without, {**config, "qv_bias": False})
    weights, report = require_complete(read_weights(tmp_path / "hf"))
    assert weights.tensors["blocks.1.attn.v_bias"].tolist() == [0] * 32
    assert "qv_bias is false" in report.notes[0]


def test_missing_and_extra_tensors_are_reported(tmp_path: Path) -> None:
    _, tensors, config = folder_of("autoencoder", tmp_path / "hf")
    cases = {
        "videomae.encoder.layer.1.attention.attention.key.weight": r"lacks videomae\.encoder.*key\.weight;",
        "videomae.encoder.layer.1.output.dense.bias": r"lacks encoder\.blocks\.1\.mlp\.fc2\.bias",
        "videomae.layernorm.weight": r"lacks encoder\.norm\.weight",
        "mask_token": "lacks mask_token",
    }
    for name, message in cases.items():
        rewrite(tmp_path / "hf", {key: t for key, t in tensors.items() if key != name}, config)
        with pytest.raises(UserError, match=message):
            require_complete(read_weights(tmp_path / "hf"))
    rewrite(tmp_path / "hf", {**tensors, "videomae.pooler.weight": torch.zeros(1)}, config)
    with pytest.raises(UserError, match=r"has videomae\.pooler\.weight, which the model does not"):
        require_complete(read_weights(tmp_path / "hf"))


def test_encoder_alone_starts_a_classifier_and_is_no_whole_model(tmp_path: Path) -> None:
    """Names written by `VideoMAEModel.save_pretrained` have no prefix."""
    weights, tensors, config = folder_of("autoencoder", tmp_path / "hf")
    bare = {name.removeprefix("videomae."): t for name, t in tensors.items() if name.startswith("videomae.")}
    rewrite(tmp_path / "hf", bare, config)
    alone = read_weights(tmp_path / "hf")
    assert alone.architecture.kind == "encoder"
    with pytest.raises(UserError, match="an encoder alone, neither a pre-training model nor a classifier"):
        require_complete(alone)
    model = EverestClassifier(make_size(), GRID, num_classes=3)
    report = load_weights(model, alone)
    assert report.ignored == ("norm.weight", "norm.bias")
    assert torch.equal(model.blocks[1].mlp.fc2.weight, weights.tensors["encoder.blocks.1.mlp.fc2.weight"])


def test_configuration_says_what_shapes_do_not(tmp_path: Path) -> None:
    labels = ModelMetadata(
        num_heads=4, num_frames=8, image_height=32, image_width=48, labels=("run", "jump", "sit")
    )
    _, _, config = folder_of("classifier", tmp_path / "hf", labels)
    expected = {
        "model_type": "videomae", "architectures": ["VideoMAEForVideoClassification"], "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": [32, 48],
        "num_frames": 8, "tubelet_size": 2, "patch_size": 16, "use_mean_pooling": True,
        "id2label": {"0": "run", "1": "jump", "2": "sit"},
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    architecture = read_weights(tmp_path / "hf").architecture
    assert (architecture.num_heads, architecture.labels) == (4, ("run", "jump", "sit"))
    assert architecture.grid == TokenGrid(time=4, rows=2, cols=3)
    assert (architecture.norm_eps, architecture.last_norm_eps) == (1e-6, 1e-5)


def test_configuration_of_something_else_is_refused(tmp_path: Path) -> None:
    _, tensors, config = folder_of("classifier", tmp_path / "hf")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model_type": "vit"}, "model_type='vit'; expected 'videomae'"),
        ({"hidden_act": "relu"}, "hidden_act='relu'; expected 'gelu'"),
        ({"intermediate_size": 96}, "intermediate_size=96 is not 4 x hidden_size=32"),
        ({"num_attention_heads": "two"}, "expected positive integers"),
        ({"layer_norm_eps": 0}, "layer_norm_eps=0; expected a positive number"),
        ({"use_mean_pooling": False}, r"reads the first token \(use_mean_pooling is false\)"),
        ({"num_frames": 5}, "does not fit their tubelets: num_frames=5"),
        ({"image_size": "large"}, "image_size='large'"),
    ]
    for change, message in cases:
        rewrite(tmp_path / "hf", tensors, {**config, **change})
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / "hf")


def test_plain_pixels_and_other_last_norms_are_noted(tmp_path: Path) -> None:
    weights, tensors, config = folder_of("autoencoder", tmp_path / "hf")
    written = write_weights(weights, tmp_path / "again", "hf")
    assert any("decoder's norm adds 1e-05 to the variance, this model's adds 1e-06" in n for n in written.notes)
    rewrite(tmp_path / "hf", tensors, {**config, "norm_pix_loss": False})
    model = EverestAutoencoder(make_size(), GRID, decoder_depth=2)
    notes = load_weights(model, read_weights(tmp_path / "hf")).notes
    assert notes == (
        "its decoder predicts plain pixels (norm_pix_loss is false), ours predicts standardised ones",
        "their norms add 1e-06 to the variance, the last one 1e-05; this model's add 1e-06",
    )


@pytest.mark.parametrize("layout", ["videomae", "hf"])
def test_embedding_of_several_layers_has_no_foreign_layout(layout: Any, tmp_path: Path) -> None:
    model = EverestClassifier(make_size(), GRID, EncoderOptions(embedding_layers=2), num_classes=3)
    weights = weights_of_run(model.state_dict(), METADATA, "memory")
    with pytest.raises(UserError, match="the tubelet embedding has 2 layers"):
        write_weights(weights, tmp_path / ("w.pth" if layout == "videomae" else "w"), layout)
    assert list(tmp_path.iterdir()) == []
