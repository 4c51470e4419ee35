"""Paired comparisons against plain enumeration, and the coverage of intervals in simulations."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from fractions import Fraction

import pytest

from everest_ds.study.paired import MAX_SEEDS, compare_pairs


def p_by_enumeration(differences: list[Fraction]) -> Fraction:
    """Return the share of sign choices with a mean at least as far from zero, in exact arithmetic."""
    flipped = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return Fraction(sum(total >= abs(sum(differences)) for total in flipped), len(flipped))


@pytest.mark.parametrize("n", [1, 2, 5, 6, 9])
def test_p_is_the_share_of_sign_choices_that_lie_as_far_from_zero(n: int) -> None:
    draw = random.Random(n)
    for _ in range(20):
        # Multiples of 1/400, like top-1 of 400 videos: many are equal, and some are zero.
        differences = [Fraction(draw.randint(-8, 20), 400) for _ in range(n)]
        found = compare_pairs([float(value) for value in differences])
        assert found.p == pytest.approx(float(p_by_enumeration(differences)), abs=1e-12)
        assert found.mean == pytest.approx(statistics.fmean(map(float, differences)))
        assert found.ahead == sum(value > 0 for value in differences)


def test_interval_holds_the_shifts_that_the_test_does_not_reject() -> None:
    """After subtracting a shift, p exceeds one minus the coverage if and only if the shift is inside."""
    draw = random.Random(0)
    for n in (4, 5, 6, 7, 8):
        differences = [draw.gauss(0.05, 0.04) for _ in range(n)]
        found = compare_pairs(differences)
        margin = 1e-6
        for shift, is_inside in (
            (found.low + margin, True), (found.high - margin, True),
            (found.low - margin, False), (found.high + margin, False),
        ):  # fmt: skip
            p = p_by_enumeration([Fraction(value - shift) for value in differences])
            assert (p > Fraction(1) - Fraction(found.coverage)) is is_inside


def test_interval_covers_as_often_as_it_says() -> None:
    """4000 samples of six from a symmetric distribution; the tolerance is four standard errors."""
    draw, held, trials = random.Random(1), 0, 4000
    for _ in range(trials):
        found = compare_pairs([1 + draw.choice((-1, 1)) * draw.expovariate(1) for _ in range(6)])
        held += found.low <= 1 <= found.high
    assert found.coverage == 1 - 2 / 64
    error = math.sqrt(found.coverage * (1 - found.coverage) / trials)
    assert held / trials == pytest.approx(found.coverage, abs=4 * error)


def test_few_seeds_say_how_little_they_can() -> None:
    five = compare_pairs([0.1, 0.11, 0.2, 0.12, 0.3])
    assert (five.p, five.low, five.high, five.coverage) == (2 / 32, 0.1, 0.3, 1 - 2 / 32)
    one = compare_pairs([0.1])
    assert (one.p, one.low, one.high, one.coverage) == (1.0, 0.1, 0.1, 0.0)
    assert compare_pairs([0.0, 0.0]).p == 1.0
    for wrong in ([], [0.1] * (MAX_SEEDS + 1)):
        with pytest.raises(ValueError, match="expected 1 to 16"):
            compare_pairs(wrong)
