from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from everest_ds.data.loading.pool import Outcome, run_guarded


def act(item: tuple[str, int]) -> int:
    """What the processes do: answer, take long, or end in one of several ways."""
    what, number = item
    if what == "hang":
        time.sleep(600)
    if what == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        os._exit(3)
    return number * number


def run(items: Sequence[tuple[str, int]], *, processes: int, timeout_s: float = 30.0) -> dict[int, Outcome]:
    outcomes = list(run_guarded(act, items, processes=processes, timeout_s=timeout_s))
    assert sorted(outcome.item for outcome in outcomes) == sorted(items)  # each once, none lost
    return {outcome.item[1]: outcome for outcome in outcomes}


def test_every_item_is_answered_once_by_any_number_of_processes() -> None:
    items = [("answer", number) for number in range(9)]
    for processes in (1, 2, 20):
        outcomes = run(items, processes=processes)
        assert {number: outcome.result for number, outcome in outcomes.items()} == {n: n * n for n in range(9)}
        assert all(outcome.fault is None and not outcome.hung for outcome in outcomes.values())
    assert run([], processes=2) == {}


def test_call_that_hangs_is_killed_and_the_others_are_answered() -> None:
    items = [("answer", 0), ("hang", 1), ("answer", 2), ("hang", 3), ("answer", 4)]
    started = time.monotonic()
    outcomes = run(items, processes=2, timeout_s=1.0)
    assert time.monotonic() - started < 60
    assert [outcomes[n].hung for n in range(5)] == [False, True, False, True, False]
    assert outcomes[1].fault == "no answer within 1 s"
    assert 1.0 <= outcomes[1].took_s < 10
    assert [outcomes[n].result for n in (0, 2, 4)] == [0, 4, 16]


def test_call_that_ends_its_process_says_how_and_the_others_are_answered() -> None:
    outcomes = run([("signal", 0), ("answer", 1), ("exit", 2), ("answer", 3)], processes=1)
    assert outcomes[0].fault == "it ended its process (signal 11)"
    assert outcomes[2].fault == "it ended its process (exit code 3)"
    assert not outcomes[0].hung
    assert [outcomes[n].result for n in (1, 3)] == [1, 9]


def test_leaving_early_leaves_no_process_behind() -> None:
    outcomes = run_guarded(act, [("answer", 1), ("hang", 2), ("hang", 3)], processes=2, timeout_s=60)
    assert next(outcomes).result == 1
    started = time.monotonic()
    outcomes.close()
    assert time.monotonic() - started < 10
