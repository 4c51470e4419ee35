from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from everest_ds.config import FinetuneConfig, FinetuneDataConfig
from everest_ds.config.file import dump_config
from everest_ds.data.lists.classes import find_class_names
from everest_ds.errors import UserError
from everest_ds.inference import trained as trained_module
from everest_ds.inference.source import InferenceOptions, clip_settings, identify, weights_kind
from everest_ds.inference.trained import load_trained
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.sizes import get_size
from everest_ds.model.weights.reading import Weights, weights_of_run
from everest_ds.recipes import get_recipe
from everest_ds.tokens import TokenGrid
from everest_ds.train.checkpoints.consolidated import metadata_of_run
from everest_ds.train.checkpoints.origin import locate
from everest_ds.train.checkpoints.save import TrainState
from everest_ds.train.tasks import encoder_options

CPU = torch.device("cpu")
OPTIONS = InferenceOptions()


def demo_ft() -> FinetuneConfig:
    config = get_recipe("demo_ft")
    assert isinstance(config, FinetuneConfig)
    return config


def classifier(seed: int = 0, num_classes: int = 8) -> EverestClassifier:
    config = demo_ft()
    torch.manual_seed(seed)
    return EverestClassifier(
        get_size(config.model.size), config.position_grid, encoder_options(config), num_classes=num_classes
    )


# The seal's entries for the files of a ZeRO-0 checkpoint.
SEALED = {name: {"size": 0, "sha256": ""} for name in ("state.json", "mp_rank_00_model_states.pt")}


def make_run(folder: Path, steps: tuple[int, ...] = (4, 8)) -> Path:
    """Create a run directory with sealed checkpoints of empty files."""
    folder.mkdir()
    (folder / "config.json").write_text(dump_config(demo_ft()))
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        state = TrainState(step=step, world_size=1, zero_stage=0, dtype="float32", videos="")
        (checkpoint / "state.json").write_text(json.dumps(asdict(state)))
        (checkpoint / "complete.json").write_text(json.dumps({"files": SEALED}))
    return folder


def test_weights_need_a_recipe_and_runs_refuse_one(tmp_path: Path) -> None:
    run = locate(make_run(tmp_path / "run"))
    (tmp_path / "w.pth").touch()
    file = locate(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth has no settings for clips; give --recipe"):
        clip_settings(file, None, OPTIONS)
    with pytest.raises(UserError, match="--recipe demo_ft has no effect"):
        clip_settings(run, demo_ft(), replace(OPTIONS, recipe="demo_ft"))
    assert clip_settings(file, demo_ft(), OPTIONS) == clip_settings(run, None, OPTIONS)


def test_options_override_the_configuration(tmp_path: Path) -> None:
    run = locate(make_run(tmp_path / "run"))
    plain = clip_settings(run, None, OPTIONS)
    assert (plain.data, plain.views, plain.selection.keep_ratio) == (demo_ft().data, demo_ft().views, 0.3)
    given = clip_settings(run, None, InferenceOptions(num_temporal=7, keep_ratio=1.0, num_workers=0, reader="pyav"))
    assert (given.views.num_temporal, given.views.num_spatial, given.num_views) == (7, 1, 7)
    assert (given.selection.keep_ratio, given.data) == (1.0, replace(demo_ft().data, num_workers=0, reader="pyav"))


def test_pretraining_says_how_long_and_large_clips_are(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    config = get_recipe("demo")
    config = replace(config, data=replace(config.data, reader="pyav"))
    settings = clip_settings(locate(tmp_path / "w.pth"), config, OPTIONS)
    assert isinstance(settings.data, FinetuneDataConfig)
    for name in ("num_frames", "sampling_stride", "image_size", "num_workers", "reader"):
        assert getattr(settings.data, name) == getattr(config.data, name)
    assert (settings.num_views, settings.selection.keep_ratio) == (1, 0.6)


def test_average_is_taken_where_there_is_one(tmp_path: Path) -> None:
    origin = locate(make_run(tmp_path / "run"))
    assert weights_kind(origin, "auto") == weights_kind(origin, "model") == "model"
    with pytest.raises(UserError, match=r"has no ema\.safetensors; use --weights model"):
        weights_kind(origin, "ema")
    (origin.weights / "ema.safetensors").touch()
    assert weights_kind(origin, "auto") == weights_kind(origin, "ema") == "ema"
    assert weights_kind(origin, "model") == "model"


def test_identity_follows_the_contents(tmp_path: Path) -> None:
    origin = locate(make_run(tmp_path / "run"))
    identity = identify(origin, "model")
    assert (identity["name"], identity["step"], identity["weights"]) == ("step-00000008", 8, "model")
    (origin.weights / "complete.json").write_text("{}")
    assert identify(origin, "model")["sha256"] != identity["sha256"]
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "a").write_text("1")
    before = identify(locate(folder), "model")
    assert (before["step"], before["name"]) == (None, "hf")
    (folder / "a").write_text("2")
    assert identify(locate(folder), "model")["sha256"] != before["sha256"]


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, EverestClassifier]:
    """A run and its model; reading the run's checkpoint is replaced by the model's weights."""
    origin, model = locate(make_run(tmp_path / "run")), classifier()

    def read(checkpoint: Path) -> Weights:
        metadata = metadata_of_run(demo_ft(), find_class_names(checkpoint.parent.parent))
        return weights_of_run(model.state_dict(), metadata, "run")

    monkeypatch.setattr(trained_module, "read_any_weights", read)
    return origin, model


def same(a: EverestClassifier, b: EverestClassifier) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_run_gives_its_model_and_its_names(run_of: tuple[Any, EverestClassifier]) -> None:
    origin, model = run_of
    settings = clip_settings(origin, None, OPTIONS)
    loaded = load_trained(origin, settings, OPTIONS, CPU)
    assert same(loaded.model, model)
    assert (loaded.has_head, loaded.kind, loaded.precision.name, loaded.attention) == (
        True,
        "model",
        "fp32",
        "sdpa",
    )
    assert (loaded.model.rule.selected_ratio, loaded.num_kept, loaded.model.training) == (0.3, 86, False)
    assert loaded.class_names == tuple("01234567")
    (origin.run_dir / "classes.txt").write_text("a b\nc\nd\ne\nf\ng\nh\ni\n")
    assert load_trained(origin, settings, OPTIONS, CPU).class_names == ("a b", *"cdefghi")
    (origin.run_dir / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"classes\.txt names 2 classes, but the head has 8"):
        load_trained(origin, settings, OPTIONS, CPU)


def test_average_replaces_what_was_trained(run_of: tuple[Any, EverestClassifier]) -> None:
    """Frozen weights have no average, so the checkpoint's are used."""
    origin, model = run_of
    averaged = classifier(seed=1)
    heads = {n: t for n, t in averaged.state_dict().items() if n.startswith(("head.", "fc_norm."))}
    save_file(heads, origin.weights / "ema.safetensors")
    settings = clip_settings(origin, None, OPTIONS)
    loaded = load_trained(origin, settings, OPTIONS, CPU)
    assert loaded.kind == "ema"
    state = loaded.model.state_dict()
    assert torch.equal(state["head.weight"], averaged.head.weight)
    assert torch.equal(state["blocks.0.mlp.fc1.weight"], model.state_dict()["blocks.0.mlp.fc1.weight"])
    assert same(load_trained(origin, settings, replace(OPTIONS, weights="model"), CPU).model, model)


def test_pretrained_encoder_has_features_and_no_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = get_recipe("demo")
    pretrained = EverestAutoencoder(get_size("tiny"), config.position_grid, EncoderOptions(patch_size=8))
    save_file(pretrained.state_dict(), tmp_path / "pt.safetensors")
    origin = locate(tmp_path / "pt.safetensors")
    loaded = load_trained(origin, clip_settings(origin, config, OPTIONS), OPTIONS, CPU)
    assert (loaded.has_head, loaded.class_names) == (False, ())
    encoder = pretrained.encoder.state_dict()
    assert all(torch.equal(t, encoder[n]) for n, t in loaded.model.state_dict().items() if n in encoder)
    # The file does not name its grid, so it is the recipe's: 16 x 48 x 48, not the official 16 x 224 x 224.
    assert loaded.model.grid == TokenGrid(time=8, rows=6, cols=6)


def test_pooled_features_are_what_the_last_norm_is_given(run_of: tuple[Any, EverestClassifier]) -> None:
    origin, _ = run_of
    loaded = load_trained(origin, clip_settings(origin, None, OPTIONS), OPTIONS, CPU)
    seen = []
    loaded.model.fc_norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    clips = torch.randint(0, 256, (2, 3, 16, 48, 48), dtype=torch.uint8)
    logits = loaded.wrap(loaded.model)(clips)
    assert torch.equal(loaded.model.pool(clips), seen[0])
    assert (logits.shape, logits.dtype) == ((2, 8), torch.float32)


def test_bfloat16_computes_in_bfloat16_and_returns_float32(run_of: tuple[Any, EverestClassifier]) -> None:
    origin, _ = run_of
    settings = clip_settings(origin, None, OPTIONS)
    clips = torch.randint(0, 256, (2, 3, 16, 48, 48), dtype=torch.uint8)
    full, half = (
        (loaded := load_trained(origin, settings, InferenceOptions(precision=name), CPU)).wrap(loaded.model)(clips)
        for name in ("fp32", "bf16")
    )
    options = InferenceOptions(precision="autocast")
    same = load_trained(origin, settings, options, CPU)
    assert same.precision.name == "autocast"
    assert torch.equal(same.wrap(same.model)(clips), half)
    assert half.dtype == torch.float32
    assert torch.equal(half, half.bfloat16().float())
    assert not torch.equal(full, half)
    torch.testing.assert_close(half, full, rtol=0.05, atol=1e-3)


def test_clips_that_do_not_fit_the_tubelets_are_refused(run_of: tuple[Any, EverestClassifier]) -> None:
    origin, _ = run_of
    settings = clip_settings(origin, None, OPTIONS)
    settings = replace(settings, data=replace(settings.data, image_size=50))
    with pytest.raises(UserError, match="image height=50"):
        load_trained(origin, settings, OPTIONS, CPU)
