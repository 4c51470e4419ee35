"""Comparisons of two conditions over the same seeds: the mean difference, an exact interval for it, an exact test.

Both rest on one assumption: without an effect each seed's difference is as likely to have the other sign. No
distribution is fitted, so a few seeds give wide intervals and large p-values: five seeds cannot give p below 1/16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_SEEDS = 16
"""All 2^n choices of signs are enumerated."""

_WANTED_COVERAGE = 0.95
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """What the differences of a few seeds say.

    Attributes:
        mean: Of the differences.
        low, high: Interval for the true difference.
        coverage: How often such an interval holds it: 95 % or a little more, or less where the seeds are too few
            for that. 0 of a single seed, whose interval is its difference.
        p: Share of the choices of signs whose mean is as far from zero as this one; two-sided.
        ahead: Seeds with a difference above zero.
        n: Seeds.
    """

    mean: float
    low: float
    high: float
    coverage: float
    p: float
    ahead: int
    n: int


def compare_pairs(differences: Sequence[float]) -> PairedTest:
    """Test differences of one or more seeds, at most `MAX_SEEDS`.

    The interval goes from the k-th smallest to the k-th largest mean of a non-empty subset of the differences. It
    misses the true one in 2k of 2^n cases (Hartigan, 1969, "Using subsample values as typical values").
    """
    n = len(differences)
    if not 1 <= n <= MAX_SEEDS:
        raise ValueError(f"{n} differences, expected 1 to {MAX_SEEDS}")
    values = np.array(differences, dtype=float)
    chosen = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    sums = (1 - 2 * chosen) @ values
    p = float(np.mean(np.abs(sums) >= abs(values.sum()) - _ROUNDING))
    means = np.sort(chosen[1:] @ values / chosen[1:].sum(axis=1))
    k = max(int((1 - _WANTED_COVERAGE) / 2 * 2**n), 1)
    return PairedTest(
        mean=float(values.mean()),
        low=float(means[k - 1]),
        high=float(means[-k]),
        coverage=1 - 2 * k / 2**n,
        p=p,
        ahead=int((values > 0).sum()),
        n=n,
    )
