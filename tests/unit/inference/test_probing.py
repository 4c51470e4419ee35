from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from everest_ds.data.lists.video_list import VideoRow
from everest_ds.inference import probing
from everest_ds.inference.passes import RowResults, UnreadableRow
from everest_ds.inference.probing import LinearProbe, knn_probabilities, score_knn, score_linear

# Sums are taken in another order; measured worst difference 4e-16.
SHARE_ATOL = 1e-13


def plain_knn(train: list[list[float]], labels: list[int], test: list[float], k: int, t: float) -> dict[int, float]:
    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    near = sorted(range(len(train)), key=lambda i: (-cosine(train[i], test), i))[:k]
    votes: dict[int, float] = {}
    for i in near:
        votes[labels[i]] = votes.get(labels[i], 0) + math.exp(cosine(train[i], test) / t)
    return {label: vote / sum(votes.values()) for label, vote in votes.items()}


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (4, 0.07), (20, 0.07), (5, 1.0), (100, 0.5)])
def test_neighbours_vote_as_in_plain_python(k: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases include lists with fewer than k videos, and test videos in several chunks."""
    monkeypatch.setattr(probing, "_PAIRS_AT_ONCE", 80)
    draw = random.Random(0)
    train = [[draw.gauss(0, 1) for _ in range(6)] for _ in range(30)]
    test = [[draw.gauss(0, 1) for _ in range(6)] for _ in range(7)]
    labels = [draw.randrange(4) for _ in train]
    shares = knn_probabilities(
        torch.tensor(train), torch.tensor(labels), torch.tensor(test), 5, k=k, temperature=temperature
    )
    # Plain Python uses the same float32 numbers.
    train, test = torch.tensor(train).tolist(), torch.tensor(test).tolist()
    for row, video in zip(shares.tolist(), test, strict=True):
        expected = plain_knn(train, labels, video, k, temperature)
        assert row == pytest.approx([expected.get(c, 0.0) for c in range(5)], rel=0, abs=SHARE_ATOL)


def test_neighbours_with_a_tiny_temperature_do_not_overflow() -> None:
    features = torch.eye(3)
    shares = knn_probabilities(features, torch.tensor([0, 1, 2]), features, 3, k=3, temperature=1e-4)
    torch.testing.assert_close(shares, torch.eye(3, dtype=torch.float64))


def toy(num: int, num_classes: int = 3) -> tuple[Tensor, Tensor]:
    """Return points around the corners of a triangle, with a further constant feature, and their labels."""
    label_N = torch.arange(num) % num_classes
    generator = torch.Generator().manual_seed(num)
    centre = 4 * torch.eye(num_classes, 5)[label_N]
    features_ND = centre + 0.3 * torch.randn(num, 5, generator=generator)
    return torch.cat([features_ND, torch.full((num, 1), 0.1)], dim=1), label_N


def test_linear_probe_separates_what_is_separable() -> None:
    probe = LinearProbe(*toy(90), 3, l2=1e-3)
    features_MD, label_M = toy(31)
    assert torch.equal(probe.logits(features_MD).argmax(dim=1), label_M)
    assert probe.weight_DK[-1].abs().max() < 1e-12  # weights of the constant feature


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_gradient_is_zero_at_the_solution(l2: float) -> None:
    """The gradient by hand: standardised features times (softmax - one-hot), plus weight decay."""
    features_ND, label_N = toy(60)
    features_ND[::7] = features_ND[::7].roll(1, dims=1)  # makes the classes not separable
    probe = LinearProbe(features_ND, label_N, 3, l2=l2)
    x_ND = (features_ND.double() - features_ND.double().mean(0)) / probe.deviation_D
    error_NK = (x_ND @ probe.weight_DK + probe.bias_K).softmax(1) - torch.eye(3, dtype=torch.float64)[label_N]
    gradient_DK = x_ND.T @ error_NK / 60 + l2 * probe.weight_DK
    assert gradient_DK.abs().max() < 1e-7
    assert error_NK.mean(dim=0).abs().max() < 1e-7


def test_linear_probe_repeats_itself() -> None:
    one, other = (LinearProbe(*toy(60), 3, l2=1e-3) for _ in range(2))
    assert torch.equal(one.weight_DK, other.weight_DK)
    assert torch.equal(one.bias_K, other.bias_K)


def results(features: Tensor, rows: list[int]) -> RowResults[Tensor]:
    gone = UnreadableRow(row=1, path="1.mp4", reason="no such file")
    return RowResults(results=dict(zip(rows, features, strict=True)), unreadable=(gone,))


def test_scores_belong_to_the_rows_that_could_be_read() -> None:
    """Row 1 is unreadable. If labels were matched by position instead of by row, every video would be wrong."""
    features, labels = toy(7)
    rows = [0, 2, 3, 4, 5, 6, 7]
    listed = [VideoRow(Path(f"{i}.mp4"), -5) for i in range(8)]
    for row, label in zip(rows, labels.tolist(), strict=True):
        listed[row] = VideoRow(listed[row].path, label)
    found = results(features, rows)
    for scores in (
        score_knn(found, listed, found, listed, 3, k=1, temperature=0.07),
        score_linear(found, listed, found, listed, 3, l2=1e-3),
    ):
        assert scores.top1 == 1.0
        assert [p.row for p in scores.predictions] == rows
        assert [bad.row for bad in scores.unreadable] == [1]


def test_label_that_no_neighbour_has_makes_the_loss_infinite() -> None:
    listed = [VideoRow(Path("0.mp4"), 0), VideoRow(Path("1.mp4"), 1)]
    train = RowResults(results={0: torch.tensor([1.0, 0.0])}, unreadable=())
    test = RowResults(results={1: torch.tensor([1.0, 0.0])}, unreadable=())
    scores = score_knn(train, listed, test, listed, 2, k=1, temperature=0.07)
    assert scores.loss == math.inf
    assert scores.top1 == 0.0
