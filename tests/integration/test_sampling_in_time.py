"""`--data.sampling-seconds` in the commands: trained, stored, used by predict, refused where it has no effect."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from everest_ds import cli
from everest_ds.data.lists.video_list import read_list
from tests.integration.launch import compute, flags
from tests.integration.test_bad_input import refused
from tests.unit.data.clips.test_timing import even_s, write_at


def features(path: Path) -> tuple[torch.Tensor, dict[str, str]]:
    with safe_open(path, "pt") as file:
        return file.get_tensor("features"), file.metadata()


def test_run_in_time_on_a_flat_folder_predicts_in_time(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files that show the same at every moment, one with each frame three times, have the same features."""
    (tmp_path / "flat").mkdir()
    for row in read_list(demo_folder / "train.csv")[:32]:
        (tmp_path / "flat" / row.path.name).symlink_to(row.path)
    assert cli.main(["index", "folder", str(tmp_path / "flat"), "--out", str(tmp_path / "lists")]) == 0
    assert "no folders of classes: the lists are for pre-training" in capsys.readouterr().out
    assert {row.label for row in read_list(tmp_path / "lists" / "train.csv")} == {-1}
    done = compute(flags(tmp_path / "lists", tmp_path / "run", "--data.sampling-seconds", "0.05", steps=1))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["sampling_seconds"] == 0.05
    slow_s = even_s(20, 1.0)
    write_at(tmp_path / "slow.mp4", slow_s)
    thrice_s = np.sort(np.concatenate([slow_s + shift for shift in (0, 1 / 60, 1 / 30)]))
    write_at(tmp_path / "fast.mp4", thrice_s, frame_of=[index // 3 for index in range(60)])
    words = ["predict", tmp_path / "run", tmp_path / "slow.mp4", tmp_path / "fast.mp4", "--num-workers", "0"]
    done = compute([*words, "--features", tmp_path / "f.safetensors"])
    assert done.returncode == 0, done.stderr
    features_ND, metadata = features(tmp_path / "f.safetensors")
    views = json.loads(metadata["views"])
    assert (views["sampling_seconds"], views["sampling_stride"]) == (0.05, None)
    # Encoded twice: the pictures differ by what H.264 loses.
    assert torch.nn.functional.cosine_similarity(features_ND[0], features_ND[1], dim=0) > 0.999


def test_seconds_where_they_have_no_meaning_are_refused(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = ["--data.train-list", str(demo_folder / "train.csv"), "--out", str(tmp_path / "run")]
    said = refused(["pretrain", "demo", *listed, "--data.sampling-seconds", "0"], capsys)
    assert "data.sampling_seconds=0.0 must be above 0" in said
    words = ["finetune", "demo_ft", *listed, "--data.sampling", "segment", "--data.sampling-seconds", "0.1"]
    assert "has no effect with data.sampling=segment" in refused(words, capsys)
    words = ["benchmark", "data", "demo", "--lists", str(demo_folder / "train.csv"), "--compare"]
    assert "samples by frame numbers" in refused([*words, "--data.sampling-seconds", "0.1"], capsys)


def test_benchmark_of_data_reads_in_time(demo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "benchmark",
        "data",
        "demo",
        "--lists",
        str(demo_folder / "train.csv"),
        "--data.sampling-seconds",
        "0.05",
    ]
    words += ["--readers", "pyav", "--workers", "--clips", "4", "--rounds", "2"]
    assert cli.main([*words, "--json"]) == 0
    (record,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (record["sampling_seconds"], record["sampling_stride"]) == (0.05, None)
