"""The command line: its frozen set of commands and flags, and each command once."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest

from everest_ds import __version__, cli
from everest_ds.benchmark import flops
from everest_ds.benchmark.options import DataBenchmarkOptions, StepOptions
from everest_ds.commands.data.prepare import PrepareOptions
from everest_ds.config import Config, FinetuneConfig, PretrainConfig, RunConfig
from everest_ds.config.file import dump_config
from everest_ds.data.demo import DemoConfig
from everest_ds.inference.job import ConversionJob, ConvertOptions, ShowOptions
from everest_ds.planning.job import PlanOptions
from everest_ds.recipes import RECIPES
from everest_ds.train.job import LaunchOptions

# Users' scripts rely on these; change one only on purpose.
COMMANDS = [
    "doctor", "demo-data", "index", "check-data", "prepare", "recipes", "plan", "pretrain", "finetune", "evaluate",
    "predict", "show", "report", "convert", "study", "benchmark",
]  # fmt: skip
SHOW_OPTIONS = [
    "out", "recipe", "list", "ratios", "compare", "frames", "gif", "mp4", "weights", "reader", "allow_unreadable",
]  # fmt: skip
PLAN_OPTIONS = ["gpus", "gpu_memory_gib", "ds_config", "precision", "json"]
DATA_BENCHMARK_OPTIONS = [
    "lists", "readers", "repeats", "workers", "rounds", "clips", "compare", "clips_per_s", "json",
]  # fmt: skip
PREPARE_OPTIONS = [
    "out", "short_side", "codec", "gop", "quality", "keep_every", "sampling_stride", "min_psnr", "reader",
    "processes", "timeout_s", "max_bad_share",
]  # fmt: skip
STEP_OPTIONS = [
    "micro_batch", "steps", "warmup", "ds_config", "precision", "memory_gib", "kernels", "compare",
    "compare_gradients", "compare_saves", "sweep_stages", "stages", "sweep_ratio", "sweep_frames", "gpus", "out",
    "json",
]  # fmt: skip
LAUNCH_OPTIONS = ["ds_config", "out", "resume", "init_from", "init_allow", "precision"]
PRETRAIN_FIELDS = {
    "data": "train_list num_frames sampling_stride sampling_seconds image_size flip repeats repeat_frames reader "
    "num_workers prefetch_batches timeout_s keep_decoded max_pixels quarantine max_bad_share crop_scales resize",
    "model": "size patch_size tubelet_size embedding_layers attention activation_checkpointing recompute_attention "
    "compile_blocks cuda_graph position_frames position_size decoder_depth",
    "selection": "strategy order distance selected_ratio visible_ratio targets budget floor ceiling quantile_decay "
    "alpha",
    "optim": "base_lr min_lr warmup_lr warmup_epochs epochs weight_decay betas eps max_grad_norm gradients",
    "batch": "global_size micro_size",
    "run": "seed max_steps log_every_steps save_every_epochs save_every_steps save_async keep_checkpoints "
    "keep_every_epochs max_skipped_steps pictures_every_steps hang_after_s check_weights_every log_to profile",
}
FINETUNE_FIELDS = {
    "data": "train_list num_frames sampling_stride sampling_seconds image_size flip repeats repeat_frames reader "
    "num_workers prefetch_batches timeout_s keep_decoded max_pixels quarantine max_bad_share val_list test_list "
    "class_names num_classes sampling crop_area crop_aspect rand_augment erase_prob mixup_alpha cutmix_alpha",
    "model": "size patch_size tubelet_size embedding_layers attention activation_checkpointing recompute_attention "
    "compile_blocks cuda_graph position_frames position_size drop_path head_init_scale freeze_encoder",
    "selection": "strategy order distance keep_ratio",
    "optim": f"{PRETRAIN_FIELDS['optim']} layer_decay label_smoothing ema_decay",
    "batch": PRETRAIN_FIELDS["batch"],
    "run": f"{PRETRAIN_FIELDS['run']} validate_every_epochs",
    "views": "num_temporal num_spatial",
}
FIELDS = {"pretrain": PRETRAIN_FIELDS, "finetune": FINETUNE_FIELDS}
ALL_RECIPES = [
    "k400_vit_s", "k400_vit_b", "k400_vit_l", "k400_vit_h", "ssv2_vit_b", "ucf101_vit_b", "ucf101_vit_b_24f",
    "hmdb51_vit_b", "oscc_vit_b", "demo", "study", "k400_vit_s_ft", "k400_vit_b_ft", "k400_vit_l_ft",
    "k400_vit_h_ft", "ssv2_vit_b_ft", "ucf101_vit_b_ft", "ucf101_vit_b_24f_ft", "hmdb51_vit_b_ft", "oscc_vit_b_ft",
    "demo_ft", "study_ft",
]  # fmt: skip


def test_command_line_is_frozen() -> None:
    assert list(cli.COMMANDS) == COMMANDS
    assert [f.name for f in dataclasses.fields(LaunchOptions)] == LAUNCH_OPTIONS
    assert [f.name for f in dataclasses.fields(PlanOptions)] == PLAN_OPTIONS
    assert [f.name for f in dataclasses.fields(ShowOptions)] == SHOW_OPTIONS
    assert [f.name for f in dataclasses.fields(DataBenchmarkOptions)] == DATA_BENCHMARK_OPTIONS
    assert [f.name for f in dataclasses.fields(PrepareOptions)] == PREPARE_OPTIONS
    assert [f.name for f in dataclasses.fields(StepOptions)] == STEP_OPTIONS
    assert sorted(RECIPES) == sorted(ALL_RECIPES)


@pytest.mark.parametrize("config", [PretrainConfig(recipe="demo"), FinetuneConfig(recipe="demo_ft")])
def test_configuration_is_frozen(config: Config) -> None:
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    found = {
        name: " ".join(f.name for f in dataclasses.fields(value))
        for name, value in sections.items()
        if name not in ("recipe", "task")
    }
    assert found == FIELDS[config.task]


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_every_field_is_a_flag_with_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for section, names in FIELDS[command].items():
        for name in names.split():
            assert f"--{section}.{name.replace('_', '-')}" in shown
    for option in LAUNCH_OPTIONS:
        assert f"--{option.replace('_', '-')}" in shown
    assert "--recipe" not in shown
    assert "--task" not in shown


def test_data_benchmark_takes_a_recipe_its_fields_and_options_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["benchmark", "data", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{option.replace('_', '-')}" in shown for option in DATA_BENCHMARK_OPTIONS)
    seen: list[tuple[Config, DataBenchmarkOptions]] = []
    monkeypatch.setattr("everest_ds.commands.benchmark.check_data", lambda *given: seen.append(given) or 0)
    words = "benchmark data k400_vit_b_ft --data.sampling-stride 2 --lists a.csv b.csv --readers pyav --workers"
    assert cli.main([*words.split(), "--json"]) == 0
    ((config, options),) = seen
    assert (config.recipe, config.data.sampling_stride) == ("k400_vit_b_ft", 2)
    assert options == DataBenchmarkOptions(
        lists=(Path("a.csv"), Path("b.csv")), readers=("pyav",), workers=(), json=True
    )
    assert cli.main(["benchmark", "--help"]) == 0
    assert "  data" in capsys.readouterr().out


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert __version__ in shown
    assert all(f"  {command}" in shown for command in COMMANDS)


def test_flags_reach_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[PretrainConfig, LaunchOptions]] = []
    monkeypatch.setattr(
        "everest_ds.commands.train.check", lambda given, world: seen.append((given.config, given.options)) or 0
    )
    words = (
        "pretrain k400_vit_l --optim.base-lr 1e-3 --data.no-flip --model.attention sdpa --out runs/x --resume never"
    )
    assert cli.main(words.split()) == 0
    config, options = seen[0]
    assert (config.recipe, config.optim.base_lr, config.data.flip, config.model.attention) == (
        "k400_vit_l", 1e-3, False, "sdpa",
    )  # fmt: skip
    assert (config.model.size, config.batch.global_size) == ("large", 512)
    assert options == LaunchOptions(out=Path("runs/x"), resume="never")


def test_names_that_may_differ_reach_the_run_and_the_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr("everest_ds.commands.train.check", lambda given, world: seen.append(given.options) or 0)
    monkeypatch.setattr("everest_ds.inference.conversion.run", lambda job, world: seen.append(job) or 0)
    assert (
        cli.main(
            [
                "pretrain",
                "demo",
                "--init-from",
                "a.pth",
                "--init-allow",
                "decoder",
                "head.weight",
                "--resume",
                "never",
            ]
        )
        == 0
    )
    assert cli.main(["convert", "a.pth", "b", "--to", "hf", "--allow", "encoder.pos_embed"]) == 0
    allowed = ("decoder", "head.weight")
    assert seen == [
        LaunchOptions(init_from=Path("a.pth"), init_allow=allowed, resume="never"),
        ConversionJob(
            source=Path("a.pth"),
            target=Path("b"),
            options=ConvertOptions(to="hf", allow=("encoder.pos_embed",)),
            recipe=None,
        ),
    ]


def test_config_of_a_run_can_stand_in_a_recipes_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(RECIPES["demo"](), run=RunConfig(seed=7))
    (tmp_path / "config.json").write_text(dump_config(config))
    seen: list[PretrainConfig] = []
    monkeypatch.setattr("everest_ds.commands.train.check", lambda given, world: seen.append(given.config) or 0)
    assert cli.main(["pretrain", str(tmp_path / "config.json"), "--run.max-steps", "3"]) == 0
    assert seen == [dataclasses.replace(config, run=RunConfig(seed=7, max_steps=3))]


def test_demo_data_command_writes_the_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo-data", str(tmp_path / "demo"), "--train", "9", "--val", "0", "--test", "0", "--num-frames", "4"]
    assert cli.main(words) == 0
    assert (tmp_path / "demo" / "train.csv").read_text().count("\n") == 9
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["num_frames"] == 4
    assert "8 classes" in capsys.readouterr().out
    assert DemoConfig().count("train") == 640


def test_recipes_command_lists_and_resolves(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == ALL_RECIPES
    assert cli.main(["recipes", "k400_vit_l", "--gpus", "4"]) == 0
    shown = capsys.readouterr().out
    assert "8 x 14 x 14 = 1568 tokens a clip, 470 selected, 156 visible, 314 targets" in shown
    assert "512 = 64 a process x 4 processes x 2 accumulation steps" in shown
    assert '"gradient_accumulation_steps": 2' in shown


# GMACs of the official models by fvcore's rules; tolerance 0.1 %.
COUNTED = {
    "PT VideoMAE ViT-S, tube 0.9": 11.557, "PT VideoMAE ViT-B, tube 0.9": 35.482,
    "PT VideoMAE ViT-L, tube 0.9": 83.110,
    "PT EVEREST ViT-S, rho 0.4": 6.338, "PT EVEREST ViT-B, rho 0.4": 21.543, "PT EVEREST ViT-L, rho 0.4": 60.778,
    "PT EVEREST ViT-S, rho 0.3": 5.748, "PT EVEREST ViT-B, rho 0.3": 19.807, "PT EVEREST ViT-L, rho 0.3": 57.970,
    "FT full ViT-S": 56.950, "FT full ViT-B": 180.489, "FT full ViT-L": 597.218,
    "FT EVEREST ViT-S, rho 0.6": 29.071, "FT EVEREST ViT-B, rho 0.6": 98.062, "FT EVEREST ViT-L, rho 0.6": 329.999,
    "PT EVEREST ViT-B, rho 0.5": 23.430, "PT EVEREST ViT-B, rho 0.2": 18.223,
    "FT EVEREST ViT-B, rho 0.8": 137.458, "FT EVEREST ViT-B, rho 0.7": 117.306, "FT EVEREST ViT-B, rho 0.5": 79.840,
    "PT EVEREST ViT-B, 24 frames": 30.650, "FT EVEREST ViT-B, 24 frames": 159.44,
    "PT ViT-B, 1 Conv3d": 19.81, "PT ViT-B, 2 Conv3d": 34.60, "PT ViT-B, 3 Conv3d": 38.30,
    "FT ViT-B, 1 Conv3d": 98.06, "FT ViT-B, 2 Conv3d": 112.86, "FT ViT-B, 3 Conv3d": 116.56,
    "PT EVEREST ViT-H, rho 0.3": 114.11, "FT EVEREST ViT-H, rho 0.6": 667.25,
    # 784 more tokens of 1536 pixel values are embedded in 768 channels than without candidates: 0.925 more.
    "PT ViT-B, rho 0.3, 16 of 24 frames": 20.732, "PT ViT-B, rho 0.5, 16 of 24 frames": 24.355,
}  # fmt: skip


@pytest.mark.parametrize("row", flops.PAPER_ROWS, ids=lambda row: f"{row.table}: {row.name}")
def test_profiled_cost_is_the_known_one(row: flops.PaperRow) -> None:
    macs = flops.count_row(row)
    assert macs.paper / 1e9 == pytest.approx(COUNTED[row.name], rel=1e-3)
    if row.gmacs is not None:  # the paper prints one to four digits
        assert macs.paper / 1e9 == pytest.approx(row.gmacs, abs=0.05)
    # A tube selection does not rank tokens, and this implementation embeds only the visible ones.
    tube = row.phase == "pretrain" and row.ratio is None
    assert macs.executed < macs.paper if tube else macs.executed >= macs.paper


def test_flops_table_has_every_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(flops, "PAPER_ROWS", flops.PAPER_ROWS[:2])
    assert cli.main(["benchmark", "flops"]) == 0
    shown = capsys.readouterr().out
    assert "11.557" in shown
    assert "+0.60%" in shown
    assert cli.main(["benchmark", "flops", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["counted_gmacs"] for row in rows] == [11.5572, 6.338]
    assert [row["paper_parameters_millions"] for row in rows] == [None, None]
    assert [row["parameters_millions"] for row in rows] == [24.0294, 24.0294]


def test_disk_without_room_is_a_message_and_other_faults_of_ours_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number), "runs/x/metrics.jsonl")

    monkeypatch.setattr("everest_ds.commands.train.check", lambda *given: fail(errno.ENOSPC))
    assert cli.main(["pretrain", "demo"]) == 2
    assert "error: No space left on device: runs/x/metrics.jsonl; free space" in capsys.readouterr().err
    monkeypatch.setattr("everest_ds.commands.train.check", lambda *given: fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        cli.main(["pretrain", "demo"])
