"""Users' mistakes: one clear message, exit code 2 on every rank, no traceback, before anything is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from everest_ds.cli import main
from everest_ds.cli.dispatch import LOADING
from everest_ds.config.file import dump_config
from everest_ds.recipes import get_recipe
from tests.conftest import REPOSITORY

ZERO2 = REPOSITORY / "ds_configs" / "zero2.json"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must be refused, and return what it said."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2, captured
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--selection.keep-ratio", "0"], ["selection.keep_ratio=0.0", "(0, 1]"]),
        (["--selection.keep-ratio", "0.001"], ["keep_ratio=0.001 of 288 tokens keeps none", "0.003472"]),
        (["--model.drop-path", "1"], ["model.drop_path=1.0", "[0, 1)"]),
        (["--model.freeze-encoder", "--model.drop-path", "0.1"], ["freeze_encoder", "set model.drop_path=0"]),
        (["--optim.layer-decay", "0"], ["optim.layer_decay=0.0", "(0, 1]"]),
        (["--optim.label-smoothing", "1"], ["optim.label_smoothing=1.0", "[0, 1)"]),
        (["--optim.ema-decay", "1"], ["optim.ema_decay=1.0", "(0, 1)"]),
        (["--data.mixup-alpha", "1", "--batch.micro-size", "1"], ["micro_size=1 must be even", "pairs"]),
        (["--data.repeats", "3"], ["global_size=32 must be a multiple of data.repeats=3"]),
        (["--data.crop-area", "0.5", "0.2"], ["data.crop_area=(0.5, 0.2)", "smaller first"]),
        (["--data.erase-prob", "2"], ["data.erase_prob=2.0", "[0, 1]"]),
        (["--data.rand-augment", "rand-x9"], ["data.rand_augment", "rand-x9"]),
        (["--data.num-classes", "1"], ["data.num_classes=1", "at least 2"]),
        (["--data.num-classes", "5"], ["data.num_classes=5", "names 8 classes"]),
        (["--data.class-names", "absent.txt"], ["absent.txt", "No such file"]),
        (["--data.val-list", "absent.csv"], ["absent.csv", "No such file"]),
        (["--views.num-temporal", "0"], ["views.num_temporal=0", "at least 1"]),
        (["--run.validate-every-epochs", "0"], ["run.validate_every_epochs=0", "at least 1"]),
    ],
)
def test_bad_fine_tuning_is_refused_before_it_starts(
    flags: list[str],
    messages: list[str],
    train_list: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    said = refused(["finetune", "demo_ft", "--data.train-list", train_list, "--out", str(out), *flags], capsys)
    assert all(message in said for message in messages), said
    assert not out.exists()


@pytest.mark.parametrize(
    ("train", "val", "messages"),
    [
        ("a.mp4 0\nb.mp4 -1\n", None, ["train.csv, line 2", "label -1", "0 to 0"]),
        ("a.mp4 0\nb.mp4 1\n", "a.mp4 2\n", ["val.csv, line 1", "label 2", "0 to 1"]),
        ("a.mp4 0\nb.mp4 2\n", "a.mp4 0\nb.mp4 1\n", ["val.csv, line 2", "class 1", "no video of class 1"]),
        ("a.mp4 0\nb.mp4 0\n", None, ["only one class"]),
    ],
)
def test_labels_that_do_not_fit_are_named(
    train: str, val: str | None, messages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"not looked into")
    words = ["finetune", "demo_ft", "--out", str(tmp_path / "run")]
    for name, text in (("train", train), ("val", val)):
        if text is not None:
            (tmp_path / f"{name}.csv").write_text(text)
            words += [f"--data.{name}-list", str(tmp_path / f"{name}.csv")]
    said = refused(words, capsys)
    assert all(message in said for message in messages), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "recipe", "meant"), [("finetune", "demo", "demo_ft"), ("pretrain", "demo_ft", "demo")]
)
def test_recipe_of_the_other_task_is_refused(
    command: str, recipe: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused([command, recipe], capsys)
    assert f"not for `everest {command}`; did you mean {meant!r}?" in said


@pytest.fixture
def train_list(demo_folder: Path) -> str:
    return str(demo_folder / "train.csv")


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--data.num-frames", "15"], ["num_frames=15", "tubelet_size=2", "use 14 or 16"]),
        (["--data.image-size", "50"], ["image height=50", "patch_size=8", "use 48 or 56"]),
        (["--selection.selected-ratio", "0"], ["selection.selected_ratio=0.0", "(0, 1]"]),
        (["--selection.visible-ratio", "1.5"], ["selection.visible_ratio=1.5", "(0, 1]"]),
        (["--selection.visible-ratio", "0.5"], ["visible_ratio=0.5 is above", "selected_ratio=0.3", "lower it"]),
        (["--batch.micro-size", "12"], ["micro_size=12", "use batch.global_size=32 with batch.micro_size=8"]),
        (["--batch.global-size", "512", "--batch.micro-size", "512"], ["has 128 videos", "global_size=512"]),
        (["--optim.base-lrr", "1"], ["optim.base-lrr"]),
        (["--optim.base-lr", "fast"], ["base-lr", "fast"]),
        (["--model.size", "giant"], ["giant", "tiny"]),
        (["--ds-config", "absent.json"], ["absent.json", "No such file"]),
        (["--resume", "runs/absent"], ["no complete checkpoint there"]),
        (["--model.cuda-graph", "on"], ["model.cuda_graph=on is not available: it needs a CUDA device, got cpu"]),
        (["--model.attention", "flash"], ["model.attention=flash is not available", "use model.attention=auto"]),
        (
            ["--model.no-activation-checkpointing", "--model.no-recompute-attention"],
            ["recompute_attention=False has no effect", "set model.activation_checkpointing=True"],
        ),
        (
            ["--model.compile-blocks", "--ds-config", str(REPOSITORY / "ds_configs" / "zero3.json")],
            ["model.compile_blocks=True is not available at ZeRO-3", "use ZeRO-0, 1 or 2"],
        ),
    ],
)
def test_bad_setting_ends_the_run_before_it_starts(
    flags: list[str],
    messages: list[str],
    train_list: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    said = refused(["pretrain", "demo", "--data.train-list", train_list, "--out", str(out), *flags], capsys)
    for message in messages:
        assert message in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], None),
        (["pretrian", "demo"], "did you mean 'pretrain'"),
        (["pretrain"], "pretrain needs a recipe first"),
        (["pretrain", "k400_vit_x"], "unknown recipe 'k400_vit_x'; did you mean 'k400_vit_"),
        (["pretrain", "demo"], "data.train_list is not set"),
        (["pretrain", "demo", "--data.train-list", "absent.csv"], "cannot read the list of videos absent.csv"),
        (["--local_rank=0", "pretrain", "demo"], "deepspeed --no_local_rank"),
        (["recipes", "k400_vitl"], "did you mean 'k400_vit_l'"),
        (["recipes", "demo", "--gpus", "7"], "use batch.global_size=28 with batch.micro_size=4 or 35 with"),
        (["recipes", "demo", "--gpus", "0"], "--gpus 0 must be at least 1"),
        (["benchmark", "flop"], "did you mean 'flops'"),
        (["benchmark", "data"], "benchmark data needs a recipe first"),
        (["benchmark", "data", "demo"], "give --data.train-list FILE, or --lists FILE"),
        (["benchmark", "data", "demo", "--lists", "absent.csv"], "cannot read the list of videos absent.csv"),
        (["benchmark", "data", "demo", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["benchmark", "data", "demo", "--workers", "2", "0"], "--workers 0 must be at least 1"),
        (["benchmark", "data", "demo", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["benchmark", "data", "demo", "--repeats"], "--repeats has no number"),
        (["benchmark", "data", "demo", "--clips-per-s", "0"], "--clips-per-s 0.0 must be above 0"),
        (["benchmark", "data", "demo", "--readers", "ffmpeg"], "ffmpeg"),
        (["doctor", "--fix"], "--fix"),
    ],
)
def test_bad_command_line_says_the_way_out(
    arguments: list[str], message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if message is None:
        assert main(arguments) == 0  # no words: the usage
        assert "usage: everest COMMAND" in capsys.readouterr().out
    else:
        assert message in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a.mp4 0\nb.mp4\n", "line 2: 'b.mp4' has no label"),
        ("a.mp4 0\nb.mp4 1\n", "none of 2 files probed"),
    ],
)
def test_bad_list_is_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.csv").write_text(text)
    assert message in refused(["pretrain", "demo", "--data.train-list", str(tmp_path / "train.csv")], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must contain a JSON object"),
        (json.dumps({"gradient_clipping": 1.0}), "it is optim.max_grad_norm"),
        (json.dumps({"train_batch_size": 8}), "it is batch.global_size"),
        (json.dumps({"optimizer": {"type": "Adam"}}), "it is in optim.*"),
        (json.dumps({"torch_autocast": {"enabled": True}}), "--precision"),
        (json.dumps({"zero_optimisation": {"stage": 2}}), "did you mean 'zero_optimization'"),
        (json.dumps({"zero_optimization": {"stage": 2, "overlap_com": True}}), "zero_optimization.overlap_com"),
        (json.dumps({"zero_optimization": {"stage": 5}}), "zero_optimization.stage"),
        (json.dumps({"zero_optimization": 2}), "zero_optimization=2 must be an object"),
        (json.dumps({"bf16": True}), "bf16=True must be an object"),
        (json.dumps({"bf16": {"enable": True}}), "bf16.enable"),
        (json.dumps({"communication_data_type": "fp99"}), "communication_data_type='fp99'"),
        (json.dumps({"data_types": {"grad_accum_dtype": "fp99"}}), "grad_accum_dtype='fp99'"),
    ],
)
def test_bad_deepspeed_file_is_refused(
    content: str, message: str, train_list: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ds.json").write_text(content)
    flags = [
        "--data.train-list",
        train_list,
        "--ds-config",
        str(tmp_path / "ds.json"),
        "--out",
        str(tmp_path / "r"),
    ]
    assert message in refused(["pretrain", "demo", *flags], capsys)


def test_directory_of_another_run_is_refused(
    train_list: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    words = ["pretrain", "demo", "--data.train-list", train_list, "--out", str(out)]
    (out / "notes.txt").write_text("not a run")
    assert "has no run" in refused(words, capsys)
    (out / "config.json").write_text(dump_config(get_recipe("demo")))
    assert "holds another run: data.train_list was None and is now" in refused(words, capsys)
    assert "--resume is never" in refused([*words, "--resume", "never"], capsys)
    raw = json.loads(dump_config(get_recipe("demo")))
    raw["data"]["traim_list"] = raw["data"].pop("train_list")
    (out / "config.json").write_text(json.dumps(raw))
    assert "did you mean 'train_list'?" in refused(["pretrain", str(out / "config.json")], capsys)
    assert "unknown key data.traim_list; did you mean 'train_list'?" in refused(words, capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.num-frames", "15"], "num_frames=15"),
        (["--optim.base-lrr", "1"], "optim.base-lrr"),
        (["--data.train-list", "absent.csv"], "absent.csv"),
        (["--batch.micro-size", "32"], "use batch.global_size=32 with batch.micro_size=16"),
        (["--ds-config", "absent.json"], "absent.json"),
    ],
)
def test_all_ranks_exit_with_2_and_one_of_them_speaks(flags: list[str], message: str, train_list: str) -> None:
    words = [sys.executable, "-m", "everest_ds", "pretrain", "demo", "--data.train-list", train_list, *flags]
    ranks = [
        subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"},
        )
        for rank in range(2)
    ]
    said = [" ".join("".join(rank.communicate(timeout=120)).split()) for rank in ranks]
    said = [text.removeprefix(LOADING).strip() for text in said]  # of rank zero, if it gets that far
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert sorted(bool(text) for text in said) == [False, True], said
    assert message in "".join(said)
    assert "Traceback" not in "".join(said)
