"""Loading weights into a model: matching tensors bitwise, others are reported, allowed or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from everest_ds.errors import UserError
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.sizes import SIZES
from everest_ds.model.weights.architecture import heads_of_width
from everest_ds.model.weights.loading import load_weights
from everest_ds.model.weights.reading import Weights, read_weights, require_complete
from everest_ds.tokens import TokenGrid
from tests.conftest import GOLDEN, GoldenModel, make_size

KEYS = json.loads((GOLDEN / "checkpoint_keys_vit_base.json").read_text())
GRID = TokenGrid(time=8, rows=14, cols=14)
SMALL_GRID = TokenGrid(time=2, rows=2, cols=2)


def read(state: dict[str, Tensor], folder: Path) -> Weights:
    torch.save({"model": state}, folder / "w.pth")
    weights = read_weights(folder / "w.pth")
    (folder / "w.pth").unlink()
    return weights


def random_state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}


def autoencoder(
    width: int = 64, depth: int = 2, decoder_depth: int = 4, grid: TokenGrid = GRID
) -> EverestAutoencoder:
    return EverestAutoencoder(make_size(width, depth), grid, decoder_depth=decoder_depth)


def classifier(width: int = 64, num_classes: int = 5, grid: TokenGrid = GRID) -> EverestClassifier:
    return EverestClassifier(make_size(width), grid, num_classes=num_classes)


@pytest.fixture(scope="module", params=sorted(KEYS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """A file with every official key of ViT-B and arbitrary values."""
    path = tmp_path_factory.mktemp("base") / "w.pth"
    torch.save(
        {"model": {n: torch.ones(shape, dtype=torch.bfloat16) for n, shape in KEYS[request.param].items()}}, path
    )
    return read_weights(path)


def test_every_official_key_loads(base: Weights) -> None:
    complete, report = require_complete(base)
    keys = KEYS["pretrain_vit_base_dd4" if base.architecture.kind == "autoencoder" else "finetune_vit_base_400"]
    assert {name: list(tensor.shape) for name, tensor in complete.tensors.items()} == keys
    assert (len(report.loaded), report.fresh, report.ignored, report.interpolated) == (len(keys), (), (), ())
    size = base.architecture.size()
    assert (size.width, size.num_heads, base.architecture.depth) == (768, 12, 12)
    if base.architecture.kind == "autoencoder":
        assert (size.decoder_width, size.decoder_num_heads, base.architecture.decoder_depth) == (384, 6, 4)
    else:
        assert base.architecture.num_classes == 400


def test_each_missing_or_extra_key_is_reported(base: Weights) -> None:
    for name in base.tensors:
        rest = {key: tensor for key, tensor in base.tensors.items() if key != name}
        with pytest.raises(UserError) as raised:
            require_complete(replace(base, tensors=rest))
        assert f"lacks {name}; expected every tensor" in str(raised.value)
    more = replace(base, tensors={**base.tensors, "encoder.pos_embed": torch.zeros(1)})
    with pytest.raises(
        UserError, match=r"has encoder\.pos_embed, which the model does not; to leave that out, use --allow"
    ):
        require_complete(more)
    complete, report = require_complete(more, allow=["encoder.pos_embed", "norm"])
    assert complete.tensors.keys() == base.tensors.keys()
    assert report.ignored == ("encoder.pos_embed",)
    assert report.notes == ("stored in bfloat16, widened to float32", "allowed but not needed: norm")


def test_missing_embedding_is_reported_when_the_file_is_read(base: Weights, tmp_path: Path) -> None:
    trunk = "encoder." if base.architecture.kind == "autoencoder" else ""
    name = f"{trunk}patch_embed.proj.weight"
    with pytest.raises(UserError, match=f"lacks {name}"):
        read({key: tensor for key, tensor in base.tensors.items() if key != name}, tmp_path)


@pytest.mark.parametrize("decoder_depth", [4, 12])
def test_depth_of_the_decoder_is_inferred(decoder_depth: int, tmp_path: Path) -> None:
    model = autoencoder(decoder_depth=decoder_depth)
    weights = read(random_state(model), tmp_path)
    assert weights.architecture.decoder_depth == decoder_depth
    report = load_weights(model, weights)
    assert len(report.loaded) == len(model.state_dict())
    assert all(torch.equal(tensor, weights.tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", SIZES)
def test_heads_of_the_named_sizes_are_known(name: str) -> None:
    size = SIZES[name]
    assert heads_of_width(size.width) == size.num_heads
    assert heads_of_width(size.decoder_width) == size.decoder_num_heads


def test_heads_that_cannot_be_told_are_not_guessed(tmp_path: Path) -> None:
    weights = read(random_state(EverestClassifier(make_size(40), GRID, num_classes=3)), tmp_path)
    with pytest.raises(UserError, match="number of attention heads is unknown for width 40"):
        weights.architecture.build()


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_tubelets_are_inferred(num_layers: int, tmp_path: Path) -> None:
    options = EncoderOptions(tubelet_size=4, patch_size=8, embedding_layers=num_layers)
    model = EverestClassifier(make_size(64), SMALL_GRID, options, num_classes=3)
    weights = read(random_state(model), tmp_path)
    assert weights.architecture.options == options
    assert require_complete(weights)[0].tensors.keys() == model.state_dict().keys()


def test_golden_weights_give_the_official_outputs(mini64: GoldenModel, tmp_path: Path) -> None:
    """From the official file to logits on all tokens, which equal the official code's."""
    state = {k.removeprefix("finetune."): v for k, v in mini64.weights.items() if k.startswith("finetune.")}
    weights = read({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path)
    model = mini64.classifier(keep_ratio=1)
    expected = model.state_dict()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    load_weights(model, weights, allow=["positions"])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_classifier_starts_from_a_pretrained_encoder_and_says_so(tmp_path: Path) -> None:
    source, model = autoencoder(), classifier()
    weights = read(random_state(source), tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, weights)
    assert report.fresh == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    loaded = {f"encoder.{name}" for name in report.loaded}
    assert {*report.ignored} == source.state_dict().keys() - loaded
    for name, tensor in model.state_dict().items():
        expected = before[name] if name in report.fresh else weights.tensors[f"encoder.{name}"]
        assert torch.equal(tensor, expected), name
    shown = report.describe()
    assert "left fresh    fc_norm (2), head (2)" in shown
    assert "ignored       mask_token, encoder.norm (2), encoder_to_decoder, decoder (56)" in shown


def test_autoencoder_starts_from_a_classifier_only_where_that_is_allowed_by_name(tmp_path: Path) -> None:
    model = autoencoder()
    weights = read(random_state(classifier()), tmp_path)
    with pytest.raises(UserError) as raised:
        load_weights(model, weights)
    message = str(raised.value)
    assert "lacks mask_token, encoder.norm.weight, encoder.norm.bias and 57 more and has fc_norm.weight" in message
    way_out = message.split("--init-allow ")[1].split()
    assert way_out == ["mask_token", "encoder.norm", "encoder_to_decoder", "decoder", "fc_norm", "head"]
    report = load_weights(model, weights, allow=way_out)
    assert len(report.loaded) == 2 + 2 * 13
    assert torch.equal(model.encoder.blocks[1].attn.q_bias, weights.tensors["blocks.1.attn.q_bias"])


def test_another_size_is_refused_with_both_names(tmp_path: Path) -> None:
    weights = read(random_state(EverestAutoencoder(SIZES["tiny"], GRID)), tmp_path)
    with torch.device("meta"):
        small = EverestAutoencoder(SIZES["small"], GRID)
    with pytest.raises(UserError, match=r"ViT-tiny, width 128, 4 blocks.* is ViT-small, width 384, 12 blocks"):
        load_weights(small, weights)
    with pytest.raises(UserError, match=r"width 64, 2 blocks.*this model is ViT-nano, width 64, 3 blocks"):
        load_weights(autoencoder(depth=3), read(random_state(autoencoder()), tmp_path))


def test_another_decoder_is_refused_or_taken_as_far_as_it_fits(tmp_path: Path) -> None:
    weights = read(random_state(autoencoder(decoder_depth=12)), tmp_path)
    model = autoencoder(decoder_depth=4)
    with pytest.raises(
        UserError, match="decoder of width 16 and 12 blocks, this model's has width 16 and 4 blocks"
    ):
        load_weights(model, weights)
    report = load_weights(model, weights, allow=["decoder"])
    assert report.fresh == ()
    assert len(report.ignored) == 8 * 13


def test_head_of_other_classes_is_refused_or_left_fresh(tmp_path: Path) -> None:
    weights = read(random_state(classifier(num_classes=7)), tmp_path)
    model = classifier(num_classes=5)
    with pytest.raises(UserError, match=r"head.weight has shape \(7, 64\), .* \(5, 64\).*--init-allow head"):
        load_weights(model, weights)
    assert load_weights(model, weights, allow=["head"]).fresh == ("head.weight", "head.bias")


def test_refused_weights_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = random_state(model)
    del state["head.bias"]
    with pytest.raises(UserError, match=r"lacks head\.bias"):
        load_weights(model, read(state, tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_heads_of_another_number_are_refused(tmp_path: Path) -> None:
    weights = read(random_state(classifier()), tmp_path)
    weights = replace(weights, architecture=replace(weights.architecture, num_heads=1))
    load_weights(classifier(), weights)  # a guess from the width does not refuse a model with two
    weights = replace(weights, architecture=replace(weights.architecture, heads_are_known=True))
    with pytest.raises(
        UserError, match=r"records \[1, None\] attention heads .* has \[2\].*--init-allow num_heads"
    ):
        load_weights(classifier(), weights)
    load_weights(classifier(), weights, allow=["num_heads"])


def test_positions_of_another_grid_are_refused_interpolated_or_laid_out_afresh(tmp_path: Path) -> None:
    state = random_state(classifier())
    other = TokenGrid(time=16, rows=14, cols=14)
    weights = read(state, tmp_path)
    with pytest.raises(UserError, match=r"--model\.position-frames 16 --model\.position-size 224; for new"):
        load_weights(classifier(grid=other), weights)
    report = load_weights(classifier(), weights, clip_grid=other)
    assert report.interpolated == ("positions 8x14x14 -> 16x14x14 tokens",)
    report = load_weights(classifier(grid=other), weights, allow=["positions"], clip_grid=other)
    assert report.interpolated == ()
    assert report.notes == ("positions are new for 16x14x14 tokens; the weights were trained with 8x14x14",)
