"""Ranks that are a tenth slower than their peers are named."""

from __future__ import annotations

import pytest

from everest_ds.train.watch.slow_ranks import find_slow


@pytest.mark.parametrize(
    ("own_s", "least_s", "slow"),
    [
        ([1.0, 1.12, 1.0, 1.0], 0.0, [1]),
        ([1.0, 1.08, 1.0, 1.0], 0.0, []),
        ([2.0, 1.0], 0.0, [0]),
        ([1.0, 1.3, 1.0, 1.4], 0.0, [1, 3]),
        ([0.6, 1.0, 1.0, 1.0], 0.0, []),  # a fast rank does not make the others slow
        ([0.01, 0.05], 1.0, []),  # only loading is slow, by a twentieth of a step
        ([0.01, 0.15], 1.0, [1]),
        ([1.0], 0.0, []),
    ],
)
def test_slow_ranks_are_those_a_tenth_above_their_peers(
    own_s: list[float], least_s: float, slow: list[int]
) -> None:
    assert [rank for rank, _, _ in find_slow(own_s, least_s)] == slow
