"""The ranks that block a hung run, found from the signs of all ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from everest_ds.train.checkpoints.owner import Owner
from everest_ds.train.watch.flight_recorder import count_queued
from everest_ds.train.watch.verdict import Sign, judge

SIGN = Sign(
    rank=0, process=Owner.of_this_process(), beat=9, step=5, position=40, phase="computing gradients", idle_s=70.0,
    limit_s=60.0, call="all_reduce, called in x (y.py:1)", waits=True, is_hung=True,
)  # fmt: skip


def signs(*changes: dict[str, Any]) -> list[Sign]:
    return [replace(SIGN, rank=rank, **change) for rank, change in enumerate(changes)]


WAITS: dict[str, Any] = {}
BUSY = {"waits": False, "call": "loop (z.py:3)"}
QUEUED = BUSY | {"queued": 200}


@pytest.mark.parametrize(
    ("ranks", "silent", "named", "why"),
    [
        ([WAITS, WAITS, WAITS], {2}, [2], "no sign of life"),
        ([WAITS, BUSY], {0}, [0], "no sign of life"),  # rank 0, too
        ([WAITS, BUSY, WAITS], (), [1], "behind"),
        ([BUSY | {"position": 39}, BUSY, WAITS], (), [0], "behind"),
        ([QUEUED, QUEUED | {"queued": 199}, QUEUED], (), [1], "behind"),  # all hosts wait for their GPUs
        ([BUSY], (), [0], "behind"),
        ([WAITS, WAITS | {"position": 41}], (), [1], "elsewhere"),  # it is past the call in which rank 0 waits
        ([WAITS, WAITS | {"position": 39}, WAITS], (), [1], "elsewhere"),
        ([WAITS | {"position": 43}, WAITS, WAITS | {"position": 43}], (), [1], "elsewhere"),
        ([WAITS, WAITS, WAITS | {"call": "broadcast, called in x (y.py:9)"}], (), [2], "elsewhere"),
        ([WAITS | {"queued": 7}, WAITS | {"queued": 7}, WAITS | {"queued": 6}], (), [2], "elsewhere"),
        ([WAITS, WAITS], (), [], "the network"),
        ([BUSY, BUSY], (), [], "none waits"),
    ],
)
def test_rank_that_holds_the_run_up_is_named(
    ranks: list[dict[str, Any]], silent: set[int], named: list[int], why: str
) -> None:
    verdict = judge(signs(*ranks), silent)
    assert verdict.ranks == named
    assert why in verdict.why


def test_collectives_are_counted_over_groups() -> None:
    entries = [{"pg_id": 0, "collective_seq_id": number} for number in (5, 6, 7)]
    entries += [{"pg_id": 1, "collective_seq_id": 3}, {"pg_id": 1, "collective_seq_id": 9, "is_p2p": True}]
    assert count_queued({"entries": entries}) == 10
    assert count_queued({}) == 0
