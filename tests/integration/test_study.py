"""`everest study` from end to end in seconds: two conditions, a failure, resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from everest_ds.errors import UserError
from everest_ds.study import conditions, runs
from everest_ds.study.conditions import StudyOptions
from everest_ds.study.runs import Scale, study
from everest_ds.study.worlds.drawing import load_mujoco

MICRO = Scale(train=16, labelled=4, test=4, pretrain_epochs=2, finetune_epochs=3)


def test_study_runs_reports_a_failure_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "a study"  # the space is on purpose
    tube, all_tokens = (
        next(condition for condition in conditions.CONDITIONS if condition.name == name)
        for name in ("tube", "tube-all")
    )
    broken = replace(all_tokens, finetune=("--selection.keep-ratio", "1.5"))
    monkeypatch.setattr(StudyOptions, "conditions", [tube, broken])
    options = StudyOptions(seeds=(2,), jobs=2)
    assert study(folder, options, MICRO) == 1
    said = capsys.readouterr().out
    assert (
        "FAILED finetune tube-all-2 (exit code 2: Error parsing config.selection: selection.keep_ratio=1.5" in said
    )
    assert f"see {folder}/runs/tube-all-2/finetune.log" in said
    (row,) = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert (row["condition"], row["seed"], row["visible_tokens"]) == ("tube", 2, 32)
    assert 0 <= row["probe_top1"] <= 1
    assert row["finetune_gmacs"] > row["pretrain_gmacs"] / 10 > 0
    assert row["pretrain_s"] > 0

    finished = folder / "runs" / "tube-2" / "pretrain" / "metrics.jsonl"
    before = finished.read_bytes()
    monkeypatch.setattr(StudyOptions, "conditions", [tube, all_tokens])
    assert study(folder, options, MICRO) == 0
    said = capsys.readouterr().out
    assert "3 of 4 runs are done already" in said
    assert "[4/4] finetune tube-all-2: top-1" in said
    assert finished.read_bytes() == before
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [row["condition"] for row in rows] == ["tube", "tube-all"]
    assert "tube, all predicted; fine-tuned on all tokens" in (folder / "table.md").read_text()
    assert (folder / "selection.svg").is_file()
    assert (folder / "commands.sh").read_text().count("python -m everest_ds") == 4
    labelled = (folder / "labelled-2.csv").read_text().splitlines()
    assert sorted(line.rsplit(" ", 1)[1] for line in labelled) == sorted("0123" * 4)
    with pytest.raises(UserError, match="contains a study with other settings"):
        study(folder, options, replace(MICRO, test=8))


@pytest.mark.slow
def test_study_of_the_physics_world_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        load_mujoco()
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = StudyOptions(world="physics", seeds=(0, 1), jobs=2, data_seed=3, only=("baseline", "none"))
    assert study(tmp_path / "s", options, MICRO) == 0
    rows = [json.loads(line) for line in (tmp_path / "s" / "results.jsonl").read_text().splitlines()]
    assert [(row["condition"], row["seed"], row["visible_tokens"]) for row in rows] == [
        (name, seed, 32) for name in ("baseline", "none") for seed in (0, 1)
    ]
    pairs = [json.loads(line) for line in (tmp_path / "s" / "paired.jsonl").read_text().splitlines()]
    assert [pair["condition"] for pair in pairs] == ["none", "none"]
    assert {pair["n"] for pair in pairs} == {2}
    assert (tmp_path / "s" / "data" / "classes.txt").read_text().split() == ["falls", "rolls", "swings", "spins"]
    settings = json.loads((tmp_path / "s" / "study.json").read_text())
    assert (settings["world"], settings["data_seed"]) == ("physics", 3)
    capsys.readouterr()
    assert study(tmp_path / "s", options, MICRO) == 0
    assert "12 of 12 runs are done already" in capsys.readouterr().out
    with pytest.raises(UserError, match="contains a study with other settings"):
        study(tmp_path / "s", StudyOptions(seeds=(0, 1)), MICRO)


def test_physics_world_that_cannot_be_drawn_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise UserError("MuJoCo cannot draw")

    monkeypatch.setattr(runs, "try_drawing", fail)
    with pytest.raises(UserError, match="cannot draw"):
        study(tmp_path / "s", StudyOptions(world="physics"), MICRO)
    assert not (tmp_path / "s").exists()


def test_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and contains no study"):
        study(tmp_path, StudyOptions(), MICRO)
