"""`everest plan`: its table, its JSON document, the command that it prints, and its refusals."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from everest_ds import cli
from everest_ds.config import BatchConfig, FinetuneConfig, PretrainConfig, PretrainDataConfig, RunConfig
from everest_ds.config.file import dump_config
from everest_ds.planning.report import config_flags
from everest_ds.recipes import get_recipe
from everest_ds.train.job import LaunchOptions
from tests.conftest import REPOSITORY

L_ON_80 = "plan k400_vit_l --gpus 8 --gpu-memory-gib 80"
H_ON_80 = "plan k400_vit_h --batch.global-size 1024 --gpus 8 --gpu-memory-gib 80"


def plan_json(words: str, capsys: pytest.CaptureFixture[str], *, code: int = 0) -> dict[str, object]:
    assert cli.main([*shlex.split(words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("words", "clips"), [(L_ON_80, 512), (H_ON_80, 1024)])
def test_plan_prints_a_fitting_setting_and_a_command_that_runs_it(
    words: str, clips: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert cli.main(words.split()) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 or line.startswith("deepspeed") for line in shown.splitlines())
    (command,) = (line for line in shown.splitlines() if line.startswith("deepspeed"))
    assert shown.startswith("recommended: ")
    found = plan_json(words, capsys)
    assert found["command"] == command
    chosen = found["recommended"]
    assert chosen["fits"]
    assert chosen["bytes"]["total"] <= 80 * 2**30
    assert f"of {80}" in shown

    seen: list[tuple[PretrainConfig, LaunchOptions]] = []
    monkeypatch.setattr(
        "everest_ds.commands.train.check", lambda given, world: seen.append((given.config, given.options)) or 0
    )
    after_module = command.split("everest_ds ", 1)[1]
    assert cli.main(shlex.split(after_module)) == 0
    ((config, options),) = seen
    assert config.batch == BatchConfig(global_size=clips, micro_size=chosen["micro_size"])
    assert config.batch.accumulation_steps(8) == chosen["accumulation_steps"]
    assert config.model.activation_checkpointing == chosen["activation_checkpointing"]
    assert options.ds_config == Path(chosen["ds_config"])
    assert options.ds_config.is_file()


def test_plan_of_a_fine_tuning_prints_a_command_that_runs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = "plan k400_vit_l_ft --gpus 8 --gpu-memory-gib 80 --optim.ema-decay 0.999"
    assert cli.main(words.split()) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 or line.startswith("deepspeed") for line in shown.splitlines())
    assert "304.3 M parameters, 400 classes assumed; 1568 tokens a clip, 940 kept" in shown
    assert "total = params + grads + optim + ema + input" in shown
    (command,) = (line for line in shown.splitlines() if line.startswith("deepspeed"))
    found = plan_json(words, capsys)
    seen: list[tuple[FinetuneConfig, LaunchOptions]] = []
    monkeypatch.setattr(
        "everest_ds.commands.train.check", lambda given, world: seen.append((given.config, given.options)) or 0
    )
    assert cli.main(shlex.split(command.split("everest_ds ", 1)[1])) == 0
    ((config, options),) = seen
    assert config.optim.ema_decay == 0.999
    assert config.batch == BatchConfig(global_size=128, micro_size=found["recommended"]["micro_size"])
    assert options.init_from == Path("WEIGHTS")


def test_plan_says_what_of_a_model_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan k400_vit_l_ft --gpus 8 --gpu-memory-gib 8 --model.freeze-encoder --model.drop-path 0"
    assert cli.main([*words.split(), "--data.num-classes", "400"]) == 0
    assert "304.3 M parameters (0.41 M trained); 1568 tokens a clip, 940 kept" in capsys.readouterr().out


def test_json_has_every_part_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(L_ON_80, capsys)
    assert len(found["settings"]) == 5 * 3
    for row in found["settings"]:
        size = row["bytes"]
        parts = ("parameters", "gradients", "optimizer", "input", "communication", "transient", "overhead")
        assert size["total"] == sum(size[part] for part in parts)
        assert 0 < size["attention"] < size["activations"]
    assert found["smallest_change"] is None


def test_attentions_outputs_are_kept_where_they_fit_and_no_recomputation_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = "plan k400_vit_l_ft --gpus 8 --gpu-memory-gib 4.05 --ds-config ds_configs/zero2.json"
    assert cli.main(words.split()) == 0
    shown = capsys.readouterr().out
    assert "recommended: zero2 with recomputation of all but attention, 128 = 4 a GPU" in shown
    (command,) = (line for line in shown.splitlines() if line.startswith("deepspeed"))
    assert "--model.activation-checkpointing --model.no-recompute-attention" in command
    rows = {
        (row["activation_checkpointing"], row["recompute_attention"]): row
        for row in plan_json(words, capsys)["settings"]
    }
    assert [row["fits"] for row in rows.values()] == [False, True, True]


def test_nothing_fits_exits_with_1_and_the_smallest_change(capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan k400_vit_h --gpus 8 --gpu-memory-gib 3"
    assert cli.main(words.split()) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("nothing fits. The smallest change that would: GPUs of")
    assert max(map(len, shown.splitlines())) <= 80
    found = plan_json(words, capsys, code=1)
    assert found["command"] is None
    assert found["recommended"] is None
    enough = found["smallest_change"]["gpu_memory_bytes"] / 2**30
    assert cli.main(f"plan k400_vit_h --gpus 8 --gpu-memory-gib {enough + 0.01:.2f}".split()) == 0


def test_file_and_config_of_a_run_can_be_planned_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only that file is considered, and the printed command names it and the run's config."""
    config = replace(get_recipe("k400_vit_b"), data=PretrainDataConfig(train_list="a b.csv", flip=False))
    (tmp_path / "config.json").write_text(dump_config(config))
    path = tmp_path / "mine.json"
    path.write_text((REPOSITORY / "ds_configs" / "zero1.json").read_text())
    words = f"plan {tmp_path}/config.json --gpus 16 --gpu-memory-gib 40 --ds-config {path}"
    found = plan_json(words, capsys)
    assert {row["ds_config"] for row in found["settings"]} == {str(path)}
    assert f"--ds-config {path}" in found["command"]
    assert f"pretrain {tmp_path}/config.json" in found["command"]
    assert "--hostfile HOSTFILE" in found["command"]  # more than one node
    assert "train-list" not in found["command"]


def test_flags_turn_one_configuration_into_another(monkeypatch: pytest.MonkeyPatch) -> None:
    base = get_recipe("k400_vit_b")
    config = replace(
        base,
        data=PretrainDataConfig(train_list="a b.csv", crop_scales=(1.0, 0.5), flip=False),
        run=RunConfig(seed=3, max_steps=7),
    )
    seen: list[PretrainConfig] = []
    monkeypatch.setattr("everest_ds.commands.train.check", lambda given, world: seen.append(given.config) or 0)
    assert cli.main(["pretrain", "k400_vit_b", *config_flags(config, base)]) == 0
    assert seen == [config]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpus 0 --gpu-memory-gib 80", "--gpus 0 must be at least 1"),
        ("--gpus 8 --gpu-memory-gib 0", "--gpu-memory-gib 0.0 must be a number of GiB above 0"),
        ("--gpus 8 --gpu-memory-gib nan", "--gpu-memory-gib nan must be a number of GiB above 0"),
        (
            "--gpus 7 --gpu-memory-gib 80",
            "batch.global_size=512 is not divisible by --gpus 7; use --batch.global-size 511 or 518, or --gpus 4",
        ),
        ("--gpus 1024 --gpu-memory-gib 80", "use --batch.global-size 1024, or --gpus 512"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_way_out(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "k400_vit_l", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_plan_of_autocast_prints_a_command_that_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main([*L_ON_80.split(), "--precision", "autocast"]) == 0
    shown = capsys.readouterr().out
    assert "batch 512 on 8 GPUs of 80 GiB, autocast" in shown
    (command,) = (line for line in shown.splitlines() if line.startswith("deepspeed"))
    found = plan_json(f"{L_ON_80} --precision autocast", capsys)
    assert (found["precision"], found["command"]) == ("autocast", command)
    in_bf16 = plan_json(L_ON_80, capsys)
    assert "--precision" not in in_bf16["command"]
    seen: list[LaunchOptions] = []
    monkeypatch.setattr("everest_ds.commands.train.check", lambda given, world: seen.append(given.options) or 0)
    assert cli.main(shlex.split(command.split("everest_ds ", 1)[1])) == 0
    assert seen[0].precision == "autocast"


def test_plan_without_a_recipe_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan"]) == 2
    assert "plan needs a recipe first; known: demo" in capsys.readouterr().err
