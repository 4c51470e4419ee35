from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from everest_ds.data.lists.video_list import VideoRow
from everest_ds.errors import UserError
from everest_ds.inference.confusion import draw_confusion, save_confusion
from everest_ds.inference.evaluation import _record
from everest_ds.inference.job import PredictOptions
from everest_ds.inference.passes import RowResults, UnreadableRow
from everest_ds.inference.results import require_own, score_summary, table, write_predictions
from everest_ds.inference.scores import Scores, rank_classes, summarise
from everest_ds.train.checkpoints.origin import Origin

NAMES = ("cut, slowly", "fold", "pour")
ROWS = [VideoRow(Path(f"{i}.mp4"), label) for i, label in enumerate((0, 0, 1, 2, 1))]


@pytest.fixture
def scores() -> Scores:
    """Scores in which row 3 is unreadable and half of classes 0 and 1 is right; class 1 is once predicted as 2."""
    logits = {0: [2, 0, 0], 1: [0, 0, 2], 2: [0, 2, 0], 4: [0, 1, 3]}
    rankings = {row: rank_classes(torch.tensor([v], dtype=torch.float32), ROWS[row].label, 5, "") for row, v in
                logits.items()}  # fmt: skip
    bad = UnreadableRow(row=3, path="3.mp4", reason="no such file")
    return summarise(RowResults(results=rankings, unreadable=(bad,)), ROWS, 3)


def test_predictions_have_every_row_in_order(scores: Scores, tmp_path: Path) -> None:
    write_predictions(scores, ROWS, NAMES, tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == list("01234")
    assert [line["correct"] for line in lines] == ["true", "false", "true", "", "false"]
    assert [line["readable"] for line in lines] == ["true", "true", "true", "false", "true"]
    assert lines[1]["label_name"] == "cut, slowly"
    assert (lines[1]["predicted"], lines[1]["predicted_name"], lines[1]["top5"]) == ("2", "pour", "2 0 1")
    assert lines[1]["top5_probabilities"] == "0.786986 0.106507 0.106507"  # e**2 / (e**2 + 2)


def test_summary_counts_what_was_left_out(scores: Scores) -> None:
    summary = score_summary(scores, NAMES, len(ROWS))
    assert (summary["num_rows"], summary["num_scored"], summary["num_unreadable"]) == (5, 4, 1)
    assert summary["unreadable"] == [{"row": 3, "path": "3.mp4", "reason": "no such file"}]
    assert (summary["top1"], summary["top5"], summary["mean_class_accuracy"]) == (0.5, None, 0.5)
    assert summary["per_class"][2] == {"name": "pour", "count": 0, "correct": 0, "accuracy": None}
    assert json.loads(json.dumps(summary)) == summary


def test_table_names_the_worst_classes(scores: Scores) -> None:
    text = table(scores, NAMES)
    assert "top-1   50.00%" in text
    assert "top-5" not in text
    assert "50.00%  cut, slowly (1 of 2), most often taken for pour" in text
    assert "NOT SCORED: 1 unreadable, the first is 3.mp4: no such file" in text


def summary_of(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "protocol": {"name": "head"},
        "checkpoint": {"path": "a", "name": "w", "weights": "model", "sha256": "1"},
        "list": {"path": "test.csv", "videos": "5 videos, abc"},
        "views": {"num_temporal": 2},
    }
    return base | changes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"protocol": {"name": "knn"}}, "protocol"),
        ({"checkpoint": {"path": "a", "name": "w", "weights": "model", "sha256": "2"}}, "checkpoint"),
        ({"checkpoint": {"path": "a", "name": "w", "weights": "ema", "sha256": "1"}}, "checkpoint"),
        ({"list": {"path": "test.csv", "videos": "5 videos, abd"}}, "list"),
        ({"views": {"num_temporal": 5}}, "view recipe"),
    ],
)
def test_folder_of_another_evaluation_is_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary_of()))
    with pytest.raises(UserError, match=f"contains an evaluation with another {named} .*name another folder"):
        require_own(tmp_path, summary_of(**changes))


def test_the_same_evaluation_may_be_done_again_from_elsewhere(tmp_path: Path) -> None:
    require_own(tmp_path, summary_of())  # no results yet
    (tmp_path / "summary.json").write_text(json.dumps(summary_of() | {"top1": 0.3}))
    moved = {"path": "/b/a", "name": "w", "weights": "model", "sha256": "1"}
    require_own(tmp_path, summary_of(checkpoint=moved, list={"path": "/b/test.csv", "videos": "5 videos, abc"}))


def test_scores_of_a_run_are_added_to_its_record(scores: Scores, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 8}\n')
    summary = summary_of(checkpoint={"step": 8}) | score_summary(scores, NAMES, len(ROWS))
    _record(Origin(given=tmp_path, weights=tmp_path, run_dir=tmp_path), summary)
    _record(Origin(given=tmp_path, weights=tmp_path), summary)  # weights outside a run have no record
    first, line = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {"kind": "train", "step": 8}
    assert (line["kind"], line["step"], line["top1"], line["num_unreadable"]) == ("test", 8, 0.5, 1)


@pytest.mark.parametrize("num_classes", [2, 8, 101, 400])
def test_confusion_is_dark_where_videos_are(num_classes: int, tmp_path: Path) -> None:
    """All videos are predicted as the next class; cells must be at their places at every size."""
    confusion = [[50 * (j == (i + 1) % num_classes) for j in range(num_classes)] for i in range(num_classes)]
    save_confusion(confusion, [f"class {i}" for i in range(num_classes)], tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert max(image.size) <= 2000
        pixels = np.asarray(image.convert("RGB"))
        dark = (pixels == (8, 48, 107)).all(axis=2).sum()
        cell = min(48, max(3, 1600 // num_classes))
        share = dark / (num_classes * cell**2)
        assert 0.7 < share <= 1  # numbers cover part of the cells
        corner = image.size[0] - 8 - num_classes * cell
        assert tuple(pixels[corner + 1, corner + cell + 1]) == (8, 48, 107)
        assert tuple(pixels[corner + 1, corner + 1]) == (247, 251, 255)


def test_confusion_shortens_long_names() -> None:
    short, long = (draw_confusion([[1, 0], [0, 1]], [name, "b"]).size for name in ("x" * 28, "x" * 500))
    assert long[0] <= short[0] + 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 0}, "--top 0 must be at least 1"),
        ({"features": Path("f.npz")}, r"f\.npz must end in \.safetensors"),
        ({"features": Path("f.safetensors"), "json": True}, "--json has no effect with --features"),
    ],
)
def test_wrong_wishes_for_predictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PredictOptions(**settings)
