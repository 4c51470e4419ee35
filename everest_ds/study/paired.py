"""Compare two conditions over the same seeds: mean difference, an exact interval and an exact sign-flip test.

Interval and test share one assumption: without an effect, each seed's difference is equally likely to have either
sign. No distribution is fitted, so few seeds give wide intervals and large p: five seeds cannot give p below 1/16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_SEEDS = 16
"""The test enumerates all 2^n choices of signs."""

_WANTED_COVERAGE = 0.95
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Result of a paired test.

    Attributes:
        mean: Mean of the differences.
        low, high: Interval for the true difference.
        coverage: How often such an interval contains the true difference: at least 95 % if there are enough seeds.
            0 for a single seed, whose interval is its difference.
        p: Share of the choices of signs whose mean is at least as far from zero as this one; two-sided.
        ahead: Number of seeds with a difference above zero.
        n: Number of seeds.
    """

    mean: float
    low: float
    high: float
    coverage: float
    p: float
    ahead: int
    n: int


def compare_pairs(differences: Sequence[float]) -> PairedTest:
    """Test the differences of 1 to `MAX_SEEDS` seeds.

    The interval reaches from the k-th smallest to the k-th largest mean over the non-empty subsets of the
    differences. It misses the true difference in 2k of 2^n cases (Hartigan, 1969, "Using subsample values as
    typical values").

    Raises:
        ValueError: There are no differences, or more than `MAX_SEEDS`.
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
