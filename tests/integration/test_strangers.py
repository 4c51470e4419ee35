"""Runs from strangers are only data: every command refuses a file that would run code, names it, and runs nothing.

The attacker can seal the files, so the seal gives no protection.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.train.checkpoints.consolidated import ALONE
from everest_ds.train.checkpoints.seal import seal
from tests.integration.launch import SMALL, compute, contents, ds_config, flags

STEP = "step-00000001"
MODEL, OPTIMISER = "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"


class Payload:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def reseal(folder: Path, **more: str) -> None:
    (folder / "complete.json").unlink()
    seal(folder, ALONE, **more)


def spoil(path: Path, payload: object) -> None:
    """Add an object to a file of torch.save, at the top level and inside a list."""
    content = torch.load(path, weights_only=False)
    torch.save({**content, "more": [1, [payload]]}, path)


def own_command(demo_folder: Path, run: Path, *extra: str, steps: int = 2) -> list[str]:
    words = [*SMALL, "--ds-config", ds_config("zero2"), "--batch.micro-size", "16", *extra]
    return flags(demo_folder, run, *words, steps=steps)


@pytest.fixture(scope="module")
def honest(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes at ZeRO-2 that one process resumed, so that there is a universal checkpoint."""
    run = tmp_path_factory.mktemp("honest") / "run"
    for processes, out in ((2, run), (1, run.with_name("other"))):
        resume = ["--resume", str(run)] if processes == 1 else []
        done = compute(own_command(demo_folder, out, *resume, steps=3 - processes), processes=processes)
        assert done.returncode == 0, done.stderr
    assert (run / "checkpoints" / f"universal-{STEP}" / "complete.json").is_file()
    return run


# Commands on the run, and their numbers of processes.
USES: dict[str, Callable[[Path, Path, Path], tuple[list[str], int]]] = {
    "resume": lambda run, demo, out: (own_command(demo, run), 2),
    "resume elsewhere": lambda run, demo, out: (own_command(demo, out, "--resume", str(run)), 2),
    "resume alone": lambda run, demo, out: (own_command(demo, run), 1),
    "init-from": lambda run, demo, out: (own_command(demo, out, "--init-from", str(run)), 1),
    "convert": lambda run, demo, out: (["convert", str(run), f"{out}.safetensors", "--to", "everest"], 1),
    "fp32": lambda run, demo, out: (["convert", str(run), f"{out}.safetensors", "--to", "deepspeed-fp32"], 1),
    "predict": lambda run, demo, out: (
        ["predict", str(run), str(next(demo.rglob("*.mp4"))), "--features", f"{out}.safetensors"],
        1,
    ),
    "evaluate": lambda run, demo, out: (
        [
            *("evaluate", str(run), "--protocol", "knn", "--out", str(out)),
            *("--list", str(demo / "train.csv"), "--train-list", str(demo / "train.csv")),
        ],
        1,
    ),
}
CASES = [
    ("resume", MODEL),
    ("resume elsewhere", OPTIMISER),
    ("resume alone", MODEL),
    ("resume alone", f"../universal-{STEP}/zero/model.mask_token/fp32.pt"),
    ("init-from", OPTIMISER),
    ("convert", OPTIMISER),
    ("fp32", MODEL),
    ("predict", MODEL),
    ("evaluate", OPTIMISER),
]


@pytest.mark.parametrize(("use", "name"), CASES, ids=[f"{use}, {name[-20:]}" for use, name in CASES])
def test_run_that_wants_to_run_code_is_refused_and_nothing_ran(
    use: str, name: str, honest: Path, demo_folder: Path, tmp_path: Path
) -> None:
    run, marker = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(honest, run)
    checkpoint = run / "checkpoints" / STEP
    path = (checkpoint / name).resolve()
    spoil(path, Payload(marker))
    if path.parent == checkpoint:
        reseal(checkpoint)
        shutil.rmtree(run / "checkpoints" / f"universal-{STEP}")
    else:
        copy = run / "checkpoints" / f"universal-{STEP}"
        reseal(copy, source=json.loads((copy / "complete.json").read_text())["source"])
    before = contents(run)
    words, processes = USES[use](run, demo_folder, tmp_path / "out")
    done = compute(words, processes=processes)
    assert not marker.exists()
    assert done.returncode == 2, done.stderr
    assert f"{path} is a pickle that would run code (posix.mkdir), so it was not opened" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(run) == before
    assert not list(tmp_path.glob("out*"))


def write_folder(folder: Path, name: str, content: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "videomae"}')
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "one.bin"}}')
    torch.save(content, folder / name)
    return folder


# Files of weights that contain a payload.
def write_zip(out: Path, content: object) -> Path:
    torch.save(content, out.with_suffix(".pth"))
    return out.with_suffix(".pth")


def write_old(out: Path, content: object) -> Path:
    torch.save(content, out.with_suffix(".pt"), _use_new_zipfile_serialization=False)
    return out.with_suffix(".pt")


def write_bare(out: Path, content: object) -> Path:
    out.with_suffix(".bin").write_bytes(pickle.dumps(content))
    return out.with_suffix(".bin")


FORMATS: dict[str, Callable[[Path, object], Path]] = {
    "zip": write_zip,
    "before torch 1.6": write_old,
    "pickle": write_bare,
    "Hugging Face": lambda out, content: write_folder(out, "pytorch_model.bin", content),
    "Hugging Face in parts": lambda out, content: write_folder(out, "one.bin", content),
    "DeepSpeed": lambda out, content: write_folder(out, MODEL, content),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_weights_that_want_to_run_code_are_refused_by_init_from(
    kind: str, demo_folder: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    source = FORMATS[kind](tmp_path / "w", {"model": {"mask_token": torch.ones(1)}, "x": [(Payload(marker),)]})
    done = compute(own_command(demo_folder, tmp_path / "out", "--init-from", str(source)))
    assert not marker.exists()
    assert done.returncode == 2, done.stderr
    assert f"everest: error: {source}" in done.stderr
    assert "is a pickle that would run code (" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
