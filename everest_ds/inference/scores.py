"""Scores of a classifier over a list. Each row counts once; its softmax is averaged over its views.

Place in the flow: clips -> `predict` -> logits of each view -> log of the mean probability -> Scores. Axes: V views
of a row, K classes.

Differs from the official code: top-1 is top-1 and top-5 is top-5, rows are identified by their position in the list
and not by their file's name, and an unreadable video does not get another video's score.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from everest_ds.data.clips.views import ViewDataset
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.errors import UserError
from everest_ds.inference.passes import Passes, RowResults, UnreadableRow

DEFAULT_TOP = 5


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The likeliest classes of a row.

    Attributes:
        classes: The likeliest classes, the likeliest first. Ties are in the order of the class numbers.
        probabilities: The probabilities of these classes, averaged over the views.
        log_probability: Log of the label's averaged probability; None for a row without a label.
        num_views: Number of views.
    """

    classes: tuple[int, ...]
    probabilities: tuple[float, ...]
    log_probability: float | None
    num_views: int


@dataclass(frozen=True, kw_only=True)
class RowPrediction:
    """A scored row; ``row`` is its position in the list, from 0."""

    row: int
    path: str
    label: int
    ranking: Ranking

    @property
    def predicted(self) -> int:
        """The likeliest class."""
        return self.ranking.classes[0]

    @property
    def is_correct(self) -> bool:
        """Whether the likeliest class is the label."""
        return self.predicted == self.label


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """Number of scored rows of a class, and how many of them were classified correctly."""

    count: int
    correct: int

    @property
    def accuracy(self) -> float | None:
        """Share of correct rows; None if the class has no rows."""
        return self.correct / self.count if self.count else None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a list. Shares are in [0, 1], over the readable rows.

    Attributes:
        top1: Share of rows whose likeliest class is the label.
        top5: Share of rows whose label is among the five likeliest; None for five classes or fewer.
        loss: Mean negative log of the label's averaged probability.
        mean_class_accuracy: Mean accuracy of the classes that are in the list.
        per_class: Counts of each class.
        confusion: Counts; rows are true classes, columns predicted ones.
        predictions: The scored rows, in order.
        unreadable: The rows that are not scored.
    """

    top1: float
    top5: float | None
    loss: float
    mean_class_accuracy: float
    per_class: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    predictions: tuple[RowPrediction, ...]
    unreadable: tuple[UnreadableRow, ...] = ()

    @property
    def num_scored(self) -> int:
        """Rows that were scored."""
        return len(self.predictions)


def score(
    predict: Callable[[Tensor], Tensor],
    dataset: ViewDataset,
    num_classes: int,
    passes: Passes,
    *,
    progress: str | None = None,
) -> Scores:
    """Score a classifier over a list. All ranks must call it, and all return the same.

    Args:
        predict: clips_BCTHW uint8 on the device -> logits (B, K), from a model in evaluation mode.
        dataset: The rows and their views; labels in [0, num_classes).
        num_classes: K.
        passes: Settings of the forward passes.
        progress: Words for progress lines; None prints nothing.

    Raises:
        UserError: A video cannot be read and that is not allowed, no video can be read, or logits are not finite.
    """
    return summarise(rank_rows(predict, dataset, passes, progress=progress), dataset.rows, num_classes)


def rank_rows(
    predict: Callable[[Tensor], Tensor],
    dataset: ViewDataset,
    passes: Passes,
    *,
    top: int = DEFAULT_TOP,
    progress: str | None = None,
) -> RowResults[Ranking]:
    """Rank the ``top`` likeliest classes of every row; see `score`."""
    rows = dataset.rows
    return passes.map(
        predict,
        lambda row, logits_VK: rank_classes(logits_VK, row.label, top, str(rows[row.index].path)),
        dataset,
        progress=progress,
    )


def rank_classes(logits_VK: Tensor, label: int, top: int, source: str) -> Ranking:
    """Average a row's softmax over its views and rank the classes, computed in float64 from logarithms.

    Raises:
        UserError: The logits are not finite.
    """
    if not logits_VK.isfinite().all():
        raise UserError(
            f"{source}: the model's outputs are not finite. Its weights have diverged or are damaged, or need "
            "--precision fp32"
        )
    num_views, num_classes = logits_VK.shape
    log_probability_VK = logits_VK.double().log_softmax(dim=1)
    mean_K = log_probability_VK.logsumexp(dim=0).sub(math.log(num_views)).clamp(max=0)
    order_K = mean_K.argsort(descending=True, stable=True)[: max(top, DEFAULT_TOP)]
    return Ranking(
        classes=tuple(order_K.tolist()),
        probabilities=tuple(mean_K[order_K].exp().tolist()),
        log_probability=float(mean_K[label]) if 0 <= label < num_classes else None,
        num_views=num_views,
    )


def summarise(outputs: RowResults[Ranking], rows: Sequence[VideoRow], num_classes: int) -> Scores:
    """Compute the scores of a list from the rankings of its rows.

    Raises:
        UserError: No row was scored.
        ValueError: There are no rows, or a label is outside [0, num_classes).
    """
    if not rows:
        raise ValueError("there are no rows to score")
    predictions = tuple(
        RowPrediction(row=row, path=str(rows[row].path), label=rows[row].label, ranking=ranking)
        for row, ranking in outputs.results.items()
    )
    if not predictions:
        bad = outputs.unreadable
        raise UserError(f"no video could be read; the first of {len(bad)} is {bad[0].path}: {bad[0].reason}")
    confusion = [[0] * num_classes for _ in range(num_classes)]
    losses = []
    for prediction in predictions:
        log_probability = prediction.ranking.log_probability
        if log_probability is None:
            raise ValueError(f"row {prediction.row}: label {prediction.label} is not in [0, {num_classes})")
        losses.append(-log_probability)
        confusion[prediction.label][prediction.predicted] += 1
    per_class = tuple(ClassScore(count=sum(counts), correct=counts[k]) for k, counts in enumerate(confusion))
    present = [entry.accuracy for entry in per_class if entry.accuracy is not None]
    in_top5 = sum(p.label in p.ranking.classes[:5] for p in predictions)
    return Scores(
        top1=sum(p.is_correct for p in predictions) / len(predictions),
        top5=in_top5 / len(predictions) if num_classes > 5 else None,
        loss=math.fsum(losses) / len(losses),
        mean_class_accuracy=math.fsum(present) / len(present),
        per_class=per_class,
        confusion=tuple(tuple(counts) for counts in confusion),
        predictions=predictions,
        unreadable=outputs.unreadable,
    )
