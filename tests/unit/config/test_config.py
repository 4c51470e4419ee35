from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from everest_ds.config import (
    BatchConfig,
    FinetuneConfig,
    OptimConfig,
    PretrainConfig,
    PretrainDataConfig,
    PretrainModelConfig,
    SelectionConfig,
)
from everest_ds.config.file import config_from_dict, dump_config, load_config
from everest_ds.errors import UserError
from everest_ds.recipes import RECIPES, get_recipe
from everest_ds.tokens import TokenGrid


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_survives_a_round_trip_through_json(name: str, tmp_path: Path) -> None:
    config = get_recipe(name)
    (tmp_path / "config.json").write_text(dump_config(config))
    assert load_config(tmp_path / "config.json") == config
    assert config.recipe == name


# Table 7 of the paper: lr, batch, warm-up, epochs, rho_pre, stride, flip.
TABLE_7 = {
    "k400_vit_s": (1.5e-4, 1024, 40, 200, 0.3, 4, True),
    "k400_vit_b": (3e-4, 1024, 40, 200, 0.3, 4, True),
    "k400_vit_l": (1.5e-4, 512, 40, 200, 0.3, 4, True),
    "ssv2_vit_b": (1.5e-4, 256, 40, 200, 0.3, 2, False),
    "ucf101_vit_b": (1e-3, 192, 40, 3200, 0.3, 4, True),
    "ucf101_vit_b_24f": (1e-3, 192, 40, 3200, 0.3, 4, True),
    "hmdb51_vit_b": (1e-3, 192, 40, 4800, 0.3, 2, True),
    "oscc_vit_b": (1e-3, 256, 20, 400, 0.5, 4, True),
}


@pytest.mark.parametrize("name", sorted(TABLE_7))
def test_recipe_has_the_settings_of_table_7(name: str) -> None:
    config = get_recipe(name)
    assert TABLE_7[name] == (
        config.optim.base_lr,
        config.batch.global_size,
        config.optim.warmup_epochs,
        config.optim.epochs,
        config.selection.selected_ratio,
        config.data.sampling_stride,
        config.data.flip,
    )
    assert (config.optim.betas, config.optim.weight_decay) == ((0.9, 0.95), 0.05)
    assert config.batch.accumulation_steps(8) == 1


def test_24_frame_recipes_have_the_tokens_of_table_12() -> None:
    """Table 12's GFLOPs follow from 235 tokens in the encoder, 705 in the decoder and 1411 in fine-tuning."""
    before, after = get_recipe("ucf101_vit_b_24f"), get_recipe("ucf101_vit_b_24f_ft")
    assert (before.num_visible, before.num_selected, before.data.num_frames) == (235, 705, 24)
    assert (after.num_kept, after.data.num_frames) == (1411, 24)
    assert before.grid == after.grid == TokenGrid(time=12, rows=14, cols=14)


def test_only_the_oscc_recipe_chooses_frames() -> None:
    chooses = {name for name, recipe in RECIPES.items() if getattr(recipe().selection, "alpha", 1) != 1}
    assert chooses == {"oscc_vit_b"}
    config = get_recipe("oscc_vit_b")
    assert (config.selection.alpha, config.candidate_frames, config.data.num_frames) == (1.5, 24, 16)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'k400_vit_l'"):
        get_recipe("k400_vitl")


def test_counts_of_a_recipe_are_the_papers() -> None:
    config = get_recipe("k400_vit_b")
    assert (config.num_selected, config.num_visible, config.num_targets) == (470, 156, 314)
    both = dataclasses.replace(config, selection=SelectionConfig(targets="selected"))
    assert both.num_targets == 470


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("data", {"num_frames": 15}, "num_frames=15 is not a positive multiple of tubelet_size=2; use 14 or 16"),
        ("data", {"image_size": 220}, "image height=220 is not a positive multiple of patch_size=16"),
        ("data", {"num_frames": 2}, "is one time step"),
        ("data", {"max_bad_share": 1.5}, "data.max_bad_share=1.5 must be a share in [0, 1]"),
        ("data", {"crop_scales": ()}, "data.crop_scales=() must be one or more shares"),
        ("selection", {"selected_ratio": 0.0}, "selection.selected_ratio=0.0 must be a share"),
        ("selection", {"selected_ratio": 1.2}, "selection.selected_ratio=1.2 must be a share"),
        ("selection", {"visible_ratio": 0.4}, "selection.visible_ratio=0.4 is above selection.selected_ratio=0.3"),
        ("selection", {"visible_ratio": 0.3}, "leaves none to reconstruct"),
        ("selection", {"visible_ratio": 0.0001}, "keeps none; use at least"),
        ("model", {"patch_size": 0}, "model.patch_size=0 must be at least 1"),
        ("model", {"embedding_layers": 3, "patch_size": 4}, "must be a multiple of 8"),
        ("optim", {"warmup_epochs": 201}, "optim.warmup_epochs=201 is above optim.epochs=200"),
        ("optim", {"betas": (0.9, 1.0)}, "optim.betas"),
        ("run", {"seed": -1}, "run.seed=-1"),
        ("run", {"log_every_steps": 0}, "run.log_every_steps=0"),
    ],
)
def test_bad_setting_is_refused_with_its_name(section: str, change: dict[str, object], message: str) -> None:
    config = PretrainConfig(recipe="k400_vit_b")
    with pytest.raises(UserError) as caught:
        dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **change)})
    assert message in str(caught.value)


def test_load_refuses_unknown_key_with_the_nearest_name() -> None:
    raw = json.loads(dump_config(PretrainConfig(recipe="demo")))
    raw["optim"]["base_ler"] = 1e-3
    with pytest.raises(UserError, match=r"unknown key optim\.base_ler; did you mean 'base_lr'\?"):
        config_from_dict(raw)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("optim", "epochs"), "200", "optim.epochs='200' is not of type int"),
        (("optim", "epochs"), True, "optim.epochs=True is not of type int"),
        (
            ("model", "size"),
            "giant",
            "model.size='giant' is not of type ('nano', 'thin', 'tiny', 'small', 'base', 'large', 'huge')",
        ),
        (("data",), [], "data. must be an object"),
        (("data", "flip"), 1, "data.flip=1 is not of type bool"),
    ],
)
def test_load_refuses_a_value_of_another_type(path: tuple[str, ...], value: object, message: str) -> None:
    raw = json.loads(dump_config(PretrainConfig(recipe="demo")))
    section = raw
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with pytest.raises(UserError) as caught:
        config_from_dict(raw)
    assert message in str(caught.value)


def test_load_refuses_a_missing_key_a_missing_file_and_no_json(tmp_path: Path) -> None:
    raw = json.loads(dump_config(PretrainConfig(recipe="demo")))
    del raw["batch"]["micro_size"]
    with pytest.raises(UserError, match=r"key batch\.micro_size is missing"):
        config_from_dict(raw)
    with pytest.raises(UserError, match="No such file"):
        load_config(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_config(tmp_path / "broken.json")


@pytest.mark.parametrize(("world", "micro", "steps"), [(1, 32, 32), (8, 128, 1), (8, 32, 4), (3, 1, 341)])
def test_accumulation_makes_up_the_global_batch(world: int, micro: int, steps: int) -> None:
    batch = BatchConfig(global_size=world * micro * steps, micro_size=micro)
    assert batch.accumulation_steps(world) == steps


@pytest.mark.parametrize(
    ("batch", "world", "message"),
    [
        (BatchConfig(global_size=32, micro_size=12), 2, "use batch.global_size=32 with batch.micro_size=8"),
        (BatchConfig(global_size=32, micro_size=64), 2, "use batch.global_size=32 with batch.micro_size=16"),
        (BatchConfig(global_size=32, micro_size=4), 3, "=30 with batch.micro_size=2 or 33 with batch.micro_size=1"),
        (
            BatchConfig(global_size=512, micro_size=64),
            6,
            "=510 with batch.micro_size=17 or 516 with batch",
        ),
    ],
)
def test_impossible_batch_names_settings_that_work(batch: BatchConfig, world: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        batch.accumulation_steps(world)
    for size, micro in re.findall(r"(\d+) with batch.micro_size=(\d+)", str(caught.value)):
        assert BatchConfig(global_size=int(size), micro_size=int(micro)).accumulation_steps(world) >= 1


def test_documents_of_recipes_say_what_to_expect() -> None:
    for name, recipe in RECIPES.items():
        document = recipe.__doc__ or ""
        assert f"{recipe().task} {name} " in document
        assert "not rerun" in document or "No expected result" in document or name in ("demo", "demo_ft")


def test_sections_are_frozen() -> None:
    for section in (PretrainDataConfig(), PretrainModelConfig(), OptimConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            section.epochs = 1  # type: ignore[misc,union-attr]


def test_positions_are_laid_out_for_the_runs_clips_or_for_those_of_its_weights() -> None:
    config = PretrainConfig(recipe="demo", data=PretrainDataConfig(num_frames=32, image_size=384))
    assert config.position_grid == config.grid == TokenGrid(time=16, rows=24, cols=24)
    config = dataclasses.replace(config, model=PretrainModelConfig(position_frames=16, position_size=224))
    assert config.grid == TokenGrid(time=16, rows=24, cols=24)
    assert config.position_grid == TokenGrid(time=8, rows=14, cols=14)
    with pytest.raises(UserError, match="num_frames=15 is not a positive multiple of tubelet_size=2"):
        dataclasses.replace(config, model=PretrainModelConfig(position_frames=15))
    with pytest.raises(UserError, match=r"model\.position_size=0 must be at least 1"):
        PretrainModelConfig(position_size=0)


@pytest.mark.parametrize(
    ("name", "base_lr", "batch", "epochs", "rho", "stride", "views"),
    [
        ("k400_vit_s_ft", 5e-4, 384, 75, 0.6, 4, (2, 3)),
        ("k400_vit_b_ft", 1e-3, 384, 35, 0.6, 4, (2, 3)),
        ("k400_vit_l_ft", 2e-3, 128, 35, 0.6, 4, (2, 3)),
        ("ssv2_vit_b_ft", 5e-4, 48, 50, 0.8, None, (2, 3)),
        ("ucf101_vit_b_ft", 1e-3, 128, 100, 0.6, 4, (5, 3)),
        ("ucf101_vit_b_24f_ft", 1e-3, 128, 100, 0.6, 4, (5, 3)),
        ("hmdb51_vit_b_ft", 1e-3, 128, 50, 0.6, 2, (10, 3)),
        ("oscc_vit_b_ft", 1e-4, 32, 30, 1.0, 10, (2, 3)),
    ],
)
def test_fine_tuning_recipes_are_those_of_table_8(
    name: str, base_lr: float, batch: int, epochs: int, rho: float, stride: int | None, views: tuple[int, int]
) -> None:
    config = get_recipe(name)
    assert isinstance(config, FinetuneConfig)
    optim, data = config.optim, config.data
    assert (optim.base_lr, optim.epochs, config.batch.global_size) == (base_lr, epochs, batch)
    assert (optim.betas, optim.weight_decay, optim.warmup_epochs) == ((0.9, 0.999), 0.05, 5)
    assert (optim.layer_decay, optim.label_smoothing, config.model.drop_path) == (0.75, 0.1, 0.1)
    assert config.selection.keep_ratio == rho
    assert data.sampling == ("dense" if stride else "segment")
    assert stride is None or data.sampling_stride == stride
    assert data.flip is (name != "ssv2_vit_b_ft")
    assert data.rand_augment is not None and data.rand_augment.startswith("rand-m9-mstd0.5")
    assert (config.views.num_temporal, config.views.num_spatial) == views
    assert not data.mixes and data.erase_prob == 0 and data.repeats == 1  # settings that the table does not list
