"""`-q` in real commands: only results, warnings and errors are printed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from everest_ds.data.lists.video_list import VideoRow, format_list, read_list
from tests.integration.launch import SMALL, compute, flags


@pytest.fixture(scope="module")
def folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some videos, lists of them, and a run of one step, made with -q."""
    folder = tmp_path_factory.mktemp("quiet")
    rows = []
    for row in read_list(demo_folder / "train.csv")[:8]:
        path = folder / "tree" / str(row.label) / row.path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(row.path, path)
        rows.append(replace(row, path=path, label=len(rows) % 2))
    (folder / "list.csv").write_text(format_list(folder / "list.csv", rows))
    (folder / "bad.csv").write_text(format_list(folder / "bad.csv", [*rows, VideoRow(folder / "gone.mp4", 0)]))
    words = ["finetune", "demo_ft", *flags(folder, folder / "run", *SMALL, steps=1)[2:]]
    words[words.index(str(folder / "train.csv"))] = str(folder / "list.csv")
    done = compute([*words, "--batch.global-size", "8", "--batch.micro-size", "8", "-q"])
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    return folder


SILENT = (
    "demo-data {out} --train 2 --val 2 --test 2",
    "show {run} {video} --out {out}",
    "convert {run} {out}.safetensors --to everest",
    "prepare {folder}/list.csv --out {out}",
    "check-data {folder}/list.csv --out {out}",
    "index folder {folder}/tree --out {out}",
    "predict {run} {video} --features {out}.safetensors",
)
SAYING = (
    "evaluate {run} --list {folder}/list.csv --num-temporal 1 --num-spatial 1 --out {out}",
    "predict {run} {video}",
    "plan demo --gpus 1 --gpu-memory-gib 24",
    "recipes demo --gpus 1",
    "recipes",
)


def run(command: str, folder: Path, *extra: str) -> tuple[int, str, str]:
    video = read_list(folder / "list.csv")[0].path
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = command.format(run=folder / "run", folder=folder, out=out, video=video).split()
    out.with_suffix(".safetensors").unlink(missing_ok=True)
    done = compute([*words, *extra])
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", SILENT, ids=lambda command: command.split("{")[0].strip())
def test_commands_that_make_files_say_nothing(command: str, folder: Path) -> None:
    assert run(command, folder, "-q") == (0, "", "")


@pytest.mark.parametrize("command", SAYING, ids=lambda command: command.split("{")[0].strip())
def test_commands_that_are_asked_for_results_print_them_alone(command: str, folder: Path) -> None:
    code, quiet, said = run(command, folder, "--quiet")
    assert (code, said) == (0, "")
    assert quiet
    assert str(folder / "out") not in quiet
    assert "loading" not in quiet


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("check-data {folder}/bad.csv --out {out}", "missing: "),
        ("prepare {folder}/bad.csv --out {out}", "left out: "),
        ("show demo {folder}/gone.mp4 --out {out}", "neither a file"),
    ],
)
def test_faults_are_said_all_the_same(command: str, fault: str, folder: Path) -> None:
    code, out, said = run(command, folder, "-q")
    assert code
    assert fault in out + said
