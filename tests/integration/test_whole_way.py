"""From a downloaded dataset to a score: index, check-data, prepare, pretrain, finetune, evaluate."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import av
import numpy as np
import pytest

from everest_ds.data.demo import DemoConfig, render_video
from everest_ds.data.lists.video_list import read_list
from tests.integration.launch import compute, metrics
from tests.unit.data.importers.layouts import write

CLASSES = ("Archery", "Biking", "Diving", "Fencing")
TRAIN, TEST = 6, 2  # videos of a class
DEMO = DemoConfig(num_frames=40, size=64, width=96)


def encode_avi(path: Path, number: int) -> None:
    """A demo video in UCF101's format: MPEG-4 in AVI."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame_HWC in render_video(DEMO, "train", number):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")))
        file.mux(stream.encode())


@pytest.fixture
def ucf101(tmp_path: Path) -> Path:
    """Four classes with the official split files; one training video is truncated, one is missing."""
    root = tmp_path / "UCF101"
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for label, name in enumerate(CLASSES):
        (root / "UCF-101" / name).mkdir(parents=True)
        for number in range(TRAIN + TEST):
            split = "train" if number < TRAIN else "test"
            video = f"{name}/v_{name}_g{number + 1:02d}_c01.avi"
            encode_avi(root / "UCF-101" / video, 8 * number + label)
            lists[split].append(f"{video} {label + 1}" if split == "train" else video)
    cut = root / "UCF-101" / "Biking" / "v_Biking_g02_c01.avi"
    cut.write_bytes(cut.read_bytes()[:1500])
    lists["train"].append("Diving/v_Diving_g20_c01.avi 3")
    annotations = root / "ucfTrainTestlist"
    write(annotations / "classInd.txt", "".join(f"{label + 1} {name}\n" for label, name in enumerate(CLASSES)))
    for split, lines in lists.items():
        write(annotations / f"{split}list01.txt", "\n".join(lines) + "\n")
    return root


def run(*words: str | Path) -> str:
    done = compute(words)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_miniature_ucf101_goes_from_its_own_layout_to_a_score(ucf101: Path, tmp_path: Path) -> None:
    originals = {path: path.read_bytes() for path in ucf101.rglob("*") if path.is_file()}
    lists, small, pre, fine = (tmp_path / name for name in ("lists", "small", "pre", "fine"))

    run("index", "ucf101", ucf101, "--out", lists)
    assert (lists / "missing.txt").read_text().split() == ["train", "Diving/v_Diving_g20_c01.avi"]
    assert (len(read_list(lists / "train.csv")), len(read_list(lists / "test.csv"))) == (24, 8)

    run("check-data", lists / "train.csv", "--max-bad-share", "0.1")
    (bad,) = read_list(lists / "train-check" / "quarantine.csv")
    assert bad.path.name == "v_Biking_g02_c01.avi"

    options = ["--out", small, "--short-side", "48", "--reader", "pyav", "--max-bad-share", "0.1"]
    run("prepare", lists / "train.csv", lists / "test.csv", *options)
    train = read_list(small / "train.csv")
    assert [row.label for row in train] == [row.label for row in read_list(lists / "train.csv") if row != bad]
    assert (small / "classes.txt").read_text().split() == list(CLASSES)

    short = ["--run.max-steps", "4", "--run.log-every-steps", "1", "--precision", "fp32", "--data.reader", "pyav"]
    short += ["--batch.global-size", "8", "--batch.micro-size", "8", "--data.num-workers", "2"]
    run("pretrain", "demo", "--data.train-list", small / "train.csv", "--out", pre, "--data.repeats", "2", *short)
    assert [line["step"] for line in metrics(pre)] == [1, 2, 3, 4]
    assert not (pre / "bad_samples.jsonl").exists()

    source = ["--data.train-list", small / "train.csv", "--data.test-list", small / "test.csv"]
    run("finetune", "demo_ft", "--init-from", pre, "--init-allow", "decoder", "--out", fine, *source, *short)
    run("evaluate", fine)
    summary = json.loads((fine / "evaluation-test" / "summary.json").read_text())
    assert len(list((fine / "evaluation-test").glob("events.out.tfevents.*"))) == 1
    assert (summary["num_rows"], summary["num_scored"], summary["num_unreadable"]) == (8, 8, 0)
    assert [(one["name"], one["count"]) for one in summary["per_class"]] == [(name, TEST) for name in CLASSES]
    assert summary["top1"] == sum(one["correct"] for one in summary["per_class"]) / 8
    with (fine / "evaluation-test" / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    assert {path: path.read_bytes() for path in originals} == originals  # nothing was written into the dataset
