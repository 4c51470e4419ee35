"""`everest evaluate` and `predict` as commands: same scores on any number of processes, each row once."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from everest_ds.cli import main
from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.inference.results import require_own
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.sizes import get_size
from everest_ds.model.weights.export import write_weights
from everest_ds.model.weights.reading import read_weights
from everest_ds.recipes import get_recipe
from everest_ds.train.tasks import build_autoencoder, encoder_options
from tests.integration.launch import compute
from tests.integration.test_bad_input import refused

NUM_CLASSES = 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of the demo's size under the official names; its large head gives distinct logits."""
    config = get_recipe("demo_ft")
    torch.manual_seed(0)
    model = EverestClassifier(
        get_size(config.model.size),
        config.position_grid,
        encoder_options(config),
        num_classes=NUM_CLASSES,
        head_init_scale=10.0,
    )
    path = tmp_path_factory.mktemp("weights") / "demo.safetensors"
    save_file(model.state_dict(), path)
    return path


def write_list(path: Path, rows: list[VideoRow]) -> Path:
    path.write_text("".join(f"{row.path} {row.label}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def eleven(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven videos, the first two of the same name in two folders."""
    folder = tmp_path_factory.mktemp("lists")
    rows = read_list(demo_folder / "train.csv")[:11]
    (folder / "elsewhere").mkdir()
    twin = folder / "elsewhere" / rows[0].path.name
    shutil.copy(rows[1].path, twin)
    return write_list(folder / "eleven.csv", [rows[0], VideoRow(twin, rows[1].label), *rows[2:]])


def words(weights: Path, videos: Path, *extra: str | Path) -> list[str]:
    fixed = ["evaluate", weights, "--recipe", "demo_ft", "--list", videos, "--num-workers", "0"]
    return [str(word) for word in [*fixed, *extra]]


def read_predictions(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def outs(weights: Path, eleven: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The evaluation of the eleven videos on one, two and three processes; two and three do not divide eleven."""
    folder = tmp_path_factory.mktemp("evaluations")
    outs = {size: folder / f"on{size}" for size in (1, 2, 3)}
    for size, out in outs.items():
        done = compute(words(weights, eleven, "--out", out, "--batch-rows", "2"), processes=size)
        assert done.returncode == 0, done.stderr
        assert "top-1" in done.stdout
    return outs


def test_summaries_are_identical_on_any_number_of_processes(outs: dict[int, Path], eleven: Path) -> None:
    for name in ("summary.json", "predictions.csv", "confusion.png"):
        assert len({(out / name).read_bytes() for out in outs.values()}) == 1, name
    check_files(outs[1], eleven)
    environments = [json.loads((out / "environment.json").read_text()) for out in outs.values()]
    assert [environment["world_size"] for environment in environments] == [1, 2, 3]


def check_files(out: Path, videos: Path) -> None:
    """Require every row once and in order, and a summary that agrees with the rows."""
    rows, lines = read_list(videos), read_predictions(out)
    assert [(int(line["row"]), line["path"], int(line["label"])) for line in lines] == [
        (i, str(row.path), row.label) for i, row in enumerate(rows)
    ]
    assert len({line["top5_probabilities"] for line in lines}) == len(rows)  # two of them have the same name
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    hits = [line["correct"] == "true" for line in lines]
    assert hits == [line["predicted"] == line["label"] for line in lines]
    assert summary["top1"] == sum(hits) / 11
    assert summary["top5"] == sum(line["label"] in line["top5"].split() for line in lines) / 11
    assert (summary["num_rows"], summary["num_scored"], summary["num_unreadable"]) == (11, 11, 0)
    confusion = [[0] * NUM_CLASSES for _ in range(NUM_CLASSES)]
    for line in lines:
        confusion[int(line["label"])][int(line["predicted"])] += 1
    assert summary["confusion"] == confusion
    assert [entry["count"] for entry in summary["per_class"]] == [sum(counts) for counts in confusion]
    assert summary["views"] == {
        "num_frames": 16,
        "sampling": "dense",
        "sampling_stride": 2,
        "image_size": 48,
        "num_temporal": 2,
        "num_spatial": 1,
        "selection": {"strategy": "rero", "order": "descending", "distance": "l2", "keep_ratio": 0.3},
        "tokens_kept": 86,
    }
    assert len(summary["checkpoint"]["sha256"]) == 64


def test_unreadable_video_fails_the_evaluation(weights: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    videos = write_list(tmp_path / "broken.csv", [VideoRow(broken, 1)])
    done = compute(words(weights, videos, "--out", tmp_path / "out"))
    assert done.returncode == 2
    assert "broken.mp4 (row 0) cannot be read" in done.stderr
    assert "--allow-unreadable" in done.stderr
    assert not (tmp_path / "out").exists()


def test_official_layout_scores_alike_and_leaves_an_allowed_unreadable_video_out(
    weights: Path, eleven: Path, outs: dict[int, Path], tmp_path: Path
) -> None:
    """The .pth layout of released weights, and a twelfth file that is not a video."""
    official, broken = tmp_path / "official.pth", tmp_path / "broken.mp4"
    write_weights(read_weights(weights), official, "videomae")
    broken.write_bytes(b"no video")
    videos = write_list(tmp_path / "twelve.csv", [*read_list(eleven), VideoRow(broken, 1)])
    out = tmp_path / "out"
    done = compute(words(official, videos, "--out", out, "--batch-rows", "2", "--allow-unreadable"))
    assert done.returncode == 0, done.stderr
    assert f"NOT SCORED: 1 unreadable, the first is {broken}" in done.stdout
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (out, outs[1]))
    assert (summary["num_rows"], summary["num_scored"], summary["num_unreadable"]) == (12, 11, 1)
    assert [(bad["row"], bad["path"]) for bad in summary["unreadable"]] == [(11, str(broken))]
    for name in ("top1", "top5", "loss", "mean_class_accuracy", "per_class", "confusion", "views"):
        assert summary[name] == expected[name], name
    *scored, left_out = read_predictions(out)
    assert scored == read_predictions(outs[1])
    assert (left_out["readable"], left_out["predicted"], left_out["correct"]) == ("false", "", "")


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda w: w.remove("demo_ft") or w.remove("--recipe"), ["has no settings for clips", "--recipe"]),
        (lambda w: w.extend(["--weights", "ema"]), ["has no ema.safetensors", "--weights model"]),
        (lambda w: w.extend(["--protocol", "knn"]), ["--protocol knn needs --train-list"]),
        (lambda w: w.extend(["--keep-ratio", "1.5"]), ["keep_ratio=1.5", "(0, 1]"]),
        (lambda w: w.extend(["--num-temporal", "0"]), ["num_temporal=0", "at least 1"]),
        (lambda w: w.extend(["--batch-rows", "0"]), ["--batch-rows 0"]),
        (lambda w: w.__setitem__(1, "absent"), ["absent does not exist"]),
        (lambda w: w.__setitem__(5, "absent.csv"), ["cannot read the list of videos absent.csv"]),
    ],
)
def test_bad_words_are_refused(
    change: Callable[[list[str]], Any],
    messages: list[str],
    weights: Path,
    eleven: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = words(weights, eleven)
    change(given)
    said = refused(given, capsys)
    for message in messages:
        assert message in said


def test_label_outside_the_classes_is_refused(
    weights: Path, eleven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_list(eleven)
    videos = write_list(tmp_path / "labels.csv", [*rows[:3], VideoRow(rows[3].path, 8)])
    said = refused(words(weights, videos), capsys)
    assert f"labels.csv, line 4: label 8 of {rows[3].path} is not in the range 0 to 7" in said


def test_weights_without_a_head_are_refused(
    weights: Path, eleven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = {n: t for n, t in read_weights(weights).tensors.items() if not n.startswith(("head.", "fc_norm."))}
    save_file(bare, tmp_path / "bare.safetensors")
    said = refused(words(tmp_path / "bare.safetensors", eleven), capsys)
    assert "no classification head" in said
    assert "--protocol knn" in said


def test_another_evaluation_is_not_overwritten(
    weights: Path, eleven: Path, outs: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(outs[1], out)
    said = refused(words(weights, eleven, "--out", out, "--num-spatial", "3"), capsys)
    assert "contains an evaluation with another view recipe" in said
    summary = json.loads((out / "summary.json").read_text())
    require_own(out, summary)  # the same evaluation may be repeated
    (out / "summary.json").write_text("{}")
    assert "was not written by `everest evaluate`" in refused(words(weights, eleven, "--out", out), capsys)


def test_predict_says_of_files_and_folders_what_evaluate_says(
    weights: Path, eleven: Path, outs: dict[int, Path], tmp_path: Path
) -> None:
    """On two processes with a file that is not a video: it is named, the others are scored, the exit code is 2."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "broken.mp4").write_bytes(b"no video")
    videos = [str(row.path) for row in read_list(eleven)]
    given = ["predict", weights, *videos, folder, "--recipe", "demo_ft", "--json", "--top", "2"]
    done = compute([*given, "--batch-rows", "2", "--num-workers", "0"], processes=2)
    assert done.returncode == 2, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["path"] for line in lines] == [*videos, str(folder / "broken.mp4")]
    assert "predictions" not in lines[-1]
    assert lines[-1]["error"]
    for line, expected in zip(lines, read_predictions(outs[1]), strict=False):
        assert [str(entry["class"]) for entry in line["predictions"]] == expected["top5"].split()[:2]
        shown = [f"{entry['probability']:.6f}" for entry in line["predictions"]]
        assert shown == expected["top5_probabilities"].split()[:2]


def test_predict_draws_what_the_classifier_looked_at(
    weights: Path, eleven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, broken = [row.path for row in read_list(eleven)[:2]], tmp_path / "broken.mp4"
    broken.touch()
    given = ["predict", str(weights), str(videos[0]), str(broken), str(videos[1]), "--recipe", "demo_ft"]
    given += ["--num-workers", "0", "--show", str(tmp_path / "seen")]
    assert main(given) == 2
    names = sorted(path.name for path in (tmp_path / "seen").iterdir())
    assert len(names) == 2
    said = capsys.readouterr().out
    assert all(f"picture  {tmp_path / 'seen' / name}" in said for name in names)
    assert main([*given, "--json"]) == 2
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["picture" in line for line in lines] == [True, False, True]
    assert main(["predict", str(weights), str(broken), *given[5:]]) == 2
    assert "--show has no effect" in refused([*given, "--features", str(tmp_path / "f.safetensors")], capsys)


def test_predict_writes_features_that_pretrained_weights_have_too(eleven: Path, tmp_path: Path) -> None:
    config = get_recipe("demo")
    torch.manual_seed(0)
    save_file(build_autoencoder(config).state_dict(), tmp_path / "pt.safetensors")
    videos = [row.path for row in read_list(eleven)[:3]]
    (tmp_path / "broken.mp4").touch()
    given = ["predict", tmp_path / "pt.safetensors", videos[0], tmp_path / "broken.mp4", *videos[1:]]
    given += ["--recipe", "demo", "--features", tmp_path / "f.safetensors", "--allow-unreadable"]
    given += ["--num-workers", "1"]
    done = compute(given)
    assert done.returncode == 0, done.stderr
    assert f"cannot read {tmp_path / 'broken.mp4'}" in done.stderr
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        metadata, features = file.metadata(), file.get_tensor("features")
    assert json.loads(metadata["paths"]) == [str(path) for path in videos]
    assert json.loads(metadata["views"])["num_temporal"] == 1
    assert (features.shape, features.dtype) == ((3, 128), torch.float32)
    assert len(features.unique(dim=0)) == 3


def test_neighbours_of_pretrained_features_recognise_their_own(eleven: Path, tmp_path: Path) -> None:
    """If the test list is also the training list, each video is its own nearest neighbour: all are right."""
    config = get_recipe("demo")
    torch.manual_seed(0)
    save_file(build_autoencoder(config).state_dict(), tmp_path / "pt.safetensors")
    given = ["evaluate", tmp_path / "pt.safetensors", "--recipe", "demo", "--list", eleven, "--train-list", eleven]
    given += ["--protocol", "knn", "--knn-k", "1", "--num-workers", "0"]
    done = compute([*given, "--out", tmp_path / "out"], processes=2)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["top1"], summary["num_scored"], summary["num_train"]) == (1.0, 11, 11)
    assert summary["protocol"]["name"] == "knn"
    assert summary["classes"] == list("01234567")
