from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everest_ds import progress
from everest_ds.config import FinetuneDataConfig, ViewsConfig
from everest_ds.data.clips.views import ViewDataset
from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.inference import passes
from everest_ds.inference.passes import Passes, RowResults
from everest_ds.inference.scores import Ranking, Scores, rank_classes, score, summarise

DATA = FinetuneDataConfig(num_frames=4, sampling_stride=2, image_size=32, num_workers=0)
VIEWS = ViewsConfig(num_temporal=2, num_spatial=1)
CPU = torch.device("cpu")
NUM_CLASSES = 8
# The oracle averages softmax in float64, the code averages logarithms; measured worst difference 2e-16.
PROBABILITY_ATOL = 1e-14


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank=rank, local_rank=rank, size=size, local_size=size)


def predict(clips_BCTHW: Tensor) -> Tensor:
    """Return logits that differ between clips and depend on the other clips of the batch."""
    features_BF = clips_BCTHW.float().mean(dim=(3, 4)).flatten(1) / 255
    weights = torch.linspace(-1, 1, features_BF.shape[1] * NUM_CLASSES).sin().view(-1, NUM_CLASSES)
    return 20 * (features_BF - 0.01 * features_BF.mean(dim=0)) @ weights


def run(
    rows: Sequence[VideoRow],
    *,
    views: ViewsConfig = VIEWS,
    data: FinetuneDataConfig = DATA,
    num_classes: int = NUM_CLASSES,
    progress: str | None = None,
    **changes: Any,
) -> Scores:
    how: dict[str, Any] = {"group_size": 3, "world": world(), "device": CPU, **changes}
    return score(predict, ViewDataset(rows, data, views), num_classes, Passes(**how), progress=progress)


class SentError(Exception):
    """Raised in place of waiting for the other ranks."""


def run_on(rows: Sequence[VideoRow], size: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[Scores]:
    """Return the scores of all ranks, run one after another: first to collect their results, then to share them."""
    sent: list[Any] = []

    def send(value: Any) -> None:
        sent.append(value)
        raise SentError

    monkeypatch.setattr(passes.distributed, "gather_objects", send)
    for rank in range(size):
        with pytest.raises(SentError):
            run(rows, world=world(rank, size), **changes)
    monkeypatch.setattr(passes.distributed, "gather_objects", lambda value: sent)
    return [run(rows, world=world(rank, size), **changes) for rank in range(size)]


@pytest.fixture(scope="module")
def rows(demo_folder: Path) -> list[VideoRow]:
    return read_list(demo_folder / "train.csv")[:11]


def softmax(logits: list[float]) -> list[float]:
    exponents = [math.exp(value - max(logits)) for value in logits]
    return [value / sum(exponents) for value in exponents]


def test_scores_equal_plain_python(rows: list[VideoRow]) -> None:
    scores = run(rows, group_size=len(rows))
    dataset = ViewDataset(rows, DATA, VIEWS)
    clips = torch.cat([dataset[i].clips_VCTHW for i in range(len(rows))])  # type: ignore[misc]
    logits = predict(clips).view(len(rows), 2, NUM_CLASSES).tolist()
    hits, hits5, losses, seen = 0, 0, [], [[0, 0] for _ in range(NUM_CLASSES)]
    for row, views, prediction in zip(rows, logits, scores.predictions, strict=True):
        first, second = (softmax(view) for view in views)
        mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        order = sorted(range(NUM_CLASSES), key=lambda k: (-mean[k], k))
        assert list(prediction.ranking.classes) == order[:5]
        assert prediction.ranking.probabilities == pytest.approx(
            [mean[k] for k in order[:5]], rel=0, abs=PROBABILITY_ATOL
        )
        hits += order[0] == row.label
        hits5 += row.label in order[:5]
        losses.append(-math.log(mean[row.label]))
        seen[row.label][0] += 1
        seen[row.label][1] += order[0] == row.label
        assert scores.confusion[row.label][order[0]] > 0
    assert 0 < hits < hits5 < len(rows)  # otherwise top-1, top-5 and the total would be equal
    assert (scores.top1, scores.top5) == (hits / len(rows), hits5 / len(rows))
    assert scores.loss == pytest.approx(sum(losses) / len(rows), rel=1e-12)
    assert [(entry.count, entry.correct) for entry in scores.per_class] == [tuple(pair) for pair in seen]
    recalls = [right / count for count, right in seen if count]
    assert scores.mean_class_accuracy == pytest.approx(sum(recalls) / len(recalls))
    assert sum(map(sum, scores.confusion)) == len(rows)
    assert sum(scores.confusion[k][k] for k in range(NUM_CLASSES)) == hits


@pytest.mark.parametrize("size", [2, 3, 5])
def test_scores_do_not_depend_on_the_number_of_processes(
    size: int, rows: list[VideoRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """11 rows in groups of 3 on 2, 3 and 5 ranks: bitwise identical scores, although logits depend on the pass."""
    alone = run(rows)
    assert [prediction.row for prediction in alone.predictions] == list(range(11))
    assert alone != run(rows, group_size=2)  # results depend on which rows share a pass
    assert run_on(rows, size, monkeypatch) == [alone] * size


def test_rows_of_the_same_name_do_not_collapse(rows: list[VideoRow], tmp_path: Path) -> None:
    doubled = []
    for folder, row in zip("abc", rows, strict=False):
        (tmp_path / folder).mkdir()
        doubled.append(VideoRow(tmp_path / folder / "clip.mp4", row.label))
        shutil.copy(row.path, doubled[-1].path)
    scores = run(doubled, group_size=1)
    expected = run(rows[:3], group_size=1)
    assert scores.num_scored == 3
    assert [p.ranking for p in scores.predictions] == [p.ranking for p in expected.predictions]
    assert len({p.ranking for p in scores.predictions}) == 3


def test_unreadable_video_is_an_error_that_names_it(rows: list[VideoRow], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.mp4 \(row 1\) cannot be read: no such file.*--allow-unreadable"):
        run([rows[0], VideoRow(tmp_path / "gone.mp4", 0), rows[1]])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_allowed_unreadable_videos_are_left_out_and_listed(
    size: int, rows: list[VideoRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whole group is unreadable, so one of two ranks has fewer passes."""
    gone = [VideoRow(tmp_path / f"gone{i}.mp4", 0) for i in range(4)]
    mixed = [gone[0], *rows[:2], *gone[1:], *rows[2:4]]
    for scores in run_on(mixed, size, monkeypatch, allow_unreadable=True):
        assert [prediction.row for prediction in scores.predictions] == [1, 2, 6, 7]
        assert scores.num_scored == 4
        assert [(bad.row, bad.reason) for bad in scores.unreadable] == [(i, "no such file") for i in (0, 3, 4, 5)]
        assert [bad.path for bad in scores.unreadable] == [str(row.path) for row in gone]
        assert sum(entry.count for entry in scores.per_class) == 4


def test_list_without_a_readable_video_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no video could be read; the first of 2 is .*gone0.mp4"):
        run([VideoRow(tmp_path / f"gone{i}.mp4", 0) for i in range(2)], allow_unreadable=True)


@pytest.mark.parametrize("same_rounds", [False, True])
def test_every_rank_runs_equally_many_passes_where_that_is_asked(
    same_rounds: bool, rows: list[VideoRow], tmp_path: Path
) -> None:
    """Five groups, one of them unreadable, on three ranks and on seven, two of which have no group."""
    gone = [VideoRow(tmp_path / "gone.mp4", 0)] * 2
    dataset = ViewDataset([*rows[:2], *gone, *rows[2:8]], DATA, VIEWS)

    def passes_of(rank: int, size: int) -> int:
        calls = []

        def compute(clips_BCTHW: Tensor) -> Tensor:
            calls.append(len(clips_BCTHW))
            return predict(clips_BCTHW)

        how = Passes(
            group_size=2, world=world(rank, size), device=CPU, allow_unreadable=True, same_rounds=same_rounds
        )
        outputs = how.map(compute, lambda row, values: None, dataset)
        readable = [i for i in range(10) if i // 2 % size == rank and i not in (2, 3)]
        assert list(outputs.results) == readable
        return len(calls)

    three, seven = [passes_of(rank, 3) for rank in range(3)], [passes_of(rank, 7) for rank in range(7)]
    assert three == ([2, 2, 2] if same_rounds else [2, 1, 1])
    assert seven == ([1] * 7 if same_rounds else [1, 0, 1, 1, 1, 0, 0])


def test_equally_likely_classes_rank_by_their_number() -> None:
    logits = torch.zeros(3, 7)
    logits[:, 4] = 1
    assert rank_classes(logits, 0, 5, "clip").classes == (4, 0, 1, 2, 3)
    assert rank_classes(logits, 0, 7, "clip").classes == (4, 0, 1, 2, 3, 5, 6)


def test_hopeless_logits_have_a_finite_loss() -> None:
    """The label's probability underflows in float64; its logarithm does not."""
    ranking = rank_classes(torch.tensor([[0.0, -2000.0]]), 1, 5, "clip")
    assert ranking.log_probability == pytest.approx(-2000)
    assert ranking.probabilities == (1.0, 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(UserError, match=r"clip\.mp4: the model's outputs are not finite"):
        rank_classes(torch.tensor([[0.0, value]]), 0, 5, "clip.mp4")


def scores_of(pairs: Sequence[tuple[int, int]], num_classes: int) -> Scores:
    """Return the scores of (label, predicted) pairs."""
    rankings = {}
    for row, (label, predicted) in enumerate(pairs):
        logits = torch.zeros(1, num_classes)
        logits[0, predicted] = 5
        rankings[row] = rank_classes(logits, label, 5, "clip")
    rows = [VideoRow(Path(f"{i}.mp4"), label) for i, (label, _) in enumerate(pairs)]
    return summarise(RowResults(results=rankings, unreadable=()), rows, num_classes)


def test_confusion_has_true_classes_in_rows() -> None:
    scores = scores_of([(0, 1), (0, 1), (1, 1), (2, 0)], 4)
    assert scores.confusion == ((0, 2, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 0))


def test_mean_class_accuracy_leaves_absent_classes_out() -> None:
    scores = scores_of([(0, 0), (0, 0), (0, 1), (1, 1)], 3)
    assert scores.top1 == 3 / 4
    assert scores.mean_class_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert scores.per_class[2].accuracy is None


@pytest.mark.parametrize(("num_classes", "has_top5"), [(2, False), (5, False), (6, True)])
def test_top5_needs_more_than_five_classes(num_classes: int, has_top5: bool) -> None:
    assert (scores_of([(0, 1)], num_classes).top5 is not None) == has_top5


def test_label_outside_the_classes_is_refused() -> None:
    ranking = Ranking(classes=(0,), probabilities=(1.0,), log_probability=None, num_views=1)
    with pytest.raises(ValueError, match=r"row 0: label 9 is not in \[0, 2\)"):
        summarise(RowResults(results={0: ranking}, unreadable=()), [VideoRow(Path("a.mp4"), 9)], 2)


def test_progress_is_printed_now_and_then(
    rows: list[VideoRow], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    run(rows[:4], group_size=2, progress="scored")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" videos ")[0] for line in lines] == ["scored 2/4", "scored 4/4"]
    assert lines[-1].endswith("ETA 0s")
