"""Scores of frozen features: weighted nearest neighbours, and a linear probe.

Place in the flow: features of a training and of a test list -> probabilities of the classes -> Scores. Computed in
float64 on the CPU, without random numbers. Axes: N training videos, M test videos, D width, K classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from everest_ds.data.lists.video_list import VideoRow
from everest_ds.inference.passes import RowResults
from everest_ds.inference.scores import DEFAULT_TOP, Ranking, Scores, rank_classes, summarise

# Number of similarities in memory at the same time (128 MiB).
_PAIRS_AT_ONCE = 2**24
# A feature is constant if its deviation over its mean is below this: float32 has no smaller differences.
_SAME = 1e-7
_MAX_ITERATIONS = 2000
_GRADIENT_TOLERANCE = 1e-9


def knn_probabilities(
    train_ND: Tensor, label_N: Tensor, test_MD: Tensor, num_classes: int, *, k: int, temperature: float
) -> Tensor:
    """Return each class's share of the votes of the k nearest training videos, (M, K) float64.

    A neighbour's vote is exp(cosine / temperature). Ties are broken by the order of the list. If the list has fewer
    than k videos, all of them vote.

    Source: weighted k-NN of Wu et al. 2018 (arXiv 1805.01978), as DINO evaluates with k = 20 and temperature 0.07.
    """
    unit_ND, unit_MD = (F.normalize(features.double(), dim=1) for features in (train_ND, test_MD))
    k = min(k, len(unit_ND))
    parts = []
    for chunk_MD in unit_MD.split(max(1, _PAIRS_AT_ONCE // len(unit_ND))):
        cosine_MN = chunk_MD @ unit_ND.T
        nearest_Mk = cosine_MN.argsort(dim=1, descending=True, stable=True)[:, :k]
        cosine_Mk = cosine_MN.gather(1, nearest_Mk)
        vote_Mk = ((cosine_Mk - cosine_Mk[:, :1]) / temperature).exp()  # relative to the nearest: no overflow
        votes_MK = torch.zeros(len(chunk_MD), num_classes, dtype=torch.float64)
        parts.append(votes_MK.scatter_add_(1, label_N[nearest_Mk], vote_Mk))
    votes_MK = torch.cat(parts)
    return votes_MK / votes_MK.sum(dim=1, keepdim=True)


class LinearProbe:
    """Multinomial logistic regression on standardised features, fitted to all of them by L-BFGS from zero.

    Minimises the mean cross-entropy plus ``l2 / 2`` times the squared norm of the weights; the bias is free. The
    problem is convex: the solution does not depend on a start or an order.

    Args:
        train_ND: Features; constant ones have no influence.
        label_N: Classes.
        num_classes: K.
        l2: Above 0; with 0, separable features would have no solution.
    """

    def __init__(self, train_ND: Tensor, label_N: Tensor, num_classes: int, *, l2: float) -> None:
        features_ND = train_ND.double()
        self.l2 = l2
        self.mean_D = features_ND.mean(dim=0)
        deviation_D = features_ND.std(dim=0, correction=0)
        varies_D = deviation_D > _SAME * self.mean_D.abs()
        self.deviation_D = torch.where(varies_D, deviation_D, torch.ones_like(deviation_D))
        width = features_ND.shape[1]
        self.weight_DK = torch.zeros(width, num_classes, dtype=torch.float64, requires_grad=True)
        self.bias_K = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
        self._fit(self.standardise(features_ND), label_N)

    def standardise(self, features_MD: Tensor) -> Tensor:
        """Return features minus the training features' mean, divided by their standard deviation."""
        return (features_MD.double() - self.mean_D) / self.deviation_D

    def loss(self, standard_ND: Tensor, label_N: Tensor) -> Tensor:
        """Return the loss that the fit minimises."""
        cross_entropy = F.cross_entropy(standard_ND @ self.weight_DK + self.bias_K, label_N)
        return cross_entropy + self.l2 / 2 * self.weight_DK.square().sum()

    @torch.no_grad()
    def logits(self, features_MD: Tensor) -> Tensor:
        """Return (M, K) float64."""
        return self.standardise(features_MD) @ self.weight_DK + self.bias_K

    def _fit(self, standard_ND: Tensor, label_N: Tensor) -> None:
        optimizer = torch.optim.LBFGS(
            [self.weight_DK, self.bias_K],
            max_iter=_MAX_ITERATIONS,
            max_eval=2 * _MAX_ITERATIONS,
            tolerance_grad=_GRADIENT_TOLERANCE,
            tolerance_change=0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(standard_ND, label_N)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)


def score_knn(
    train: RowResults[Tensor],
    train_rows: Sequence[VideoRow],
    test: RowResults[Tensor],
    test_rows: Sequence[VideoRow],
    num_classes: int,
    *,
    k: int,
    temperature: float,
) -> Scores:
    """Score the features of a test list by their neighbours in a training list.

    The loss is infinite if a video has no neighbour with its label.
    """
    train_ND, label_N = _stack(train, train_rows)
    test_MD, label_M = _stack(test, test_rows)
    share_MK = knn_probabilities(train_ND, label_N, test_MD, num_classes, k=k, temperature=temperature)
    order_MK = share_MK.argsort(dim=1, descending=True, stable=True)[:, :DEFAULT_TOP]
    rankings = {
        row: Ranking(
            classes=tuple(order_K.tolist()),
            probabilities=tuple(share_K[order_K].tolist()),
            log_probability=math.log(share_K[label]) if share_K[label] else -math.inf,
            num_views=1,
        )
        for row, share_K, order_K, label in zip(test.results, share_MK, order_MK, label_M, strict=True)
    }
    return summarise(RowResults(results=rankings, unreadable=test.unreadable), test_rows, num_classes)


def score_linear(
    train: RowResults[Tensor],
    train_rows: Sequence[VideoRow],
    test: RowResults[Tensor],
    test_rows: Sequence[VideoRow],
    num_classes: int,
    *,
    l2: float,
) -> Scores:
    """Score the features of a test list by a linear probe that is fitted to a training list."""
    probe = LinearProbe(*_stack(train, train_rows), num_classes, l2=l2)
    test_MD, label_M = _stack(test, test_rows)
    rankings = {
        row: rank_classes(logits_K[None], label, DEFAULT_TOP, str(test_rows[row].path))
        for row, logits_K, label in zip(test.results, probe.logits(test_MD), label_M.tolist(), strict=True)
    }
    return summarise(RowResults(results=rankings, unreadable=test.unreadable), test_rows, num_classes)


def _stack(features: RowResults[Tensor], rows: Sequence[VideoRow]) -> tuple[Tensor, Tensor]:
    """Return the features and labels of the rows that could be read."""
    features_ND = torch.stack(list(features.results.values()))
    return features_ND, torch.tensor([rows[row].label for row in features.results])
