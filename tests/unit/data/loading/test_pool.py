from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from everest_ds.data.loading.pool import Mark, Outcome, Pool
from everest_ds.data.loading.shared_memory import Layout, Places
from everest_ds.errors import UserError


def act(item: tuple[str, float], mark: Mark) -> float:
    """What the processes do."""
    what, number = item
    if what == "marks":  # three parts, each within the time, all of them together not
        for part in range(3):
            mark(part)
            time.sleep(number)
    if what == "hang":
        mark(int(number))
        time.sleep(600)
    if what == "kill":
        mark(int(number))
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise ValueError(f"no {number}")
    if what == "refuse":
        raise UserError(f"set another {number}")
    return 2 * number


def blocked_signals(item: int, mark: Mark) -> set[int]:
    """The signals that are blocked in a process, from the kernel's own account."""
    status = Path("/proc/self/status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
    return {number for number in range(1, 32) if mask >> (number - 1) & 1}


def test_signals_of_a_terminal_or_launcher_are_left_to_the_parent() -> None:
    """They come to whole trees of processes. The processes inherit it, so that none is ever open to them."""
    pool: Pool[int, set[int]] = Pool(blocked_signals, processes=2, timeout_s=30)
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    try:
        pids = pool.pids
        for pid in pids:
            for number in stops:
                os.kill(pid, number)
        pool.submit(0)
        (outcome,) = pool.wait(60)
        assert outcome.fault is None
        assert set(stops) <= (outcome.result or set())
        assert pool.pids == pids
    finally:
        pool.close()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def never_begin() -> None:
    os._exit(7)


def run(items: list[tuple[str, float]], *, timeout_s: float = 30.0, depth: int = 2) -> list[Outcome]:
    pool: Pool[tuple[str, float], float] = Pool(act, processes=2, timeout_s=timeout_s, depth=depth)
    try:
        for item in items:
            pool.submit(item)
        outcomes: list[Outcome] = []
        while len(outcomes) < len(items):
            outcomes += pool.wait(60)
        assert pool.wait(0) == []
        return outcomes
    finally:
        pool.close()


@pytest.mark.parametrize("depth", [1, 3])
def test_items_behind_one_that_ends_its_process_are_answered(depth: int) -> None:
    items = [("kill", 3.0), *[("answer", float(n)) for n in range(12)], ("kill", 5.0)]
    outcomes = run(items, depth=depth)
    assert sorted(outcome.item for outcome in outcomes) == sorted(items)
    for outcome in outcomes:
        what, number = outcome.item
        if what == "kill":
            assert (outcome.fault, outcome.mark) == ("it ended its process (signal 9)", number)
        else:
            assert (outcome.result, outcome.fault) == (2 * number, None)


def test_time_runs_from_mark_to_mark() -> None:
    outcomes = {
        outcome.item: outcome for outcome in run([("marks", 0.7), ("hang", 4.0), ("answer", 1.0)], timeout_s=1.5)
    }
    assert outcomes["marks", 0.7].result == 1.4
    assert outcomes["marks", 0.7].took_s > 2
    hung = outcomes["hang", 4.0]
    assert (hung.fault, hung.hung, hung.mark) == ("no answer within 1.5 s", True, 4)


def test_item_submitted_as_first_overtakes_those_that_wait() -> None:
    pool: Pool[tuple[str, float], float] = Pool(act, processes=1, timeout_s=30)
    try:
        for number in (1.0, 2.0, 3.0):
            pool.submit(("answer", number))
        pool.submit(("answer", 9.0), first=True)
        order: list[float] = []
        while len(order) < 4:
            order += [outcome.item[1] for outcome in pool.wait(60)]
        assert order == [1.0, 9.0, 2.0, 3.0]
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("raise", RuntimeError, r"in a process that reads videos:(.|\n)*ValueError: no 1"),
        ("refuse", UserError, "^set another 1"),
    ],
)
def test_exception_in_a_process_is_raised_where_it_was_asked_for(
    what: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run([(what, 1.0)])


def test_processes_that_cannot_begin_are_an_error_and_not_an_endless_loop() -> None:
    pool: Pool[tuple[str, float], float] = Pool(act, processes=2, timeout_s=30, begin=never_begin)
    pool.submit(("answer", 1.0))
    try:
        with pytest.raises(RuntimeError, match=r"end before they can begin \(exit code 7\)"):
            pool.wait(60)
    finally:
        pool.close()


def test_closed_pool_leaves_no_process_and_answers_nothing() -> None:
    pool: Pool[tuple[str, float], float] = Pool(act, processes=2, timeout_s=600)
    pids = pool.pids
    pool.submit(("hang", 1.0))
    pool.wait(1)
    pool.close()
    assert pool.wait(5) == []
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_places_hold_what_fits_and_take_memory_only_where_written_to() -> None:
    places = Places(3, 4)
    square = Layout((2, 2), (2, 1))
    places.view(1, square).copy_(torch.tensor([[1, 2], [3, 4]]))
    assert places.view(1, square).tolist() == [[1, 2], [3, 4]]
    assert places.view(1, Layout.of(torch.empty(2, 2).T)).tolist() == [[1, 3], [2, 4]]
    with pytest.raises(ValueError, match="5 bytes do not fit into a place of 4"):
        places.view(0, Layout((5,), (1,)))
    assert places.view(2, square).tolist() == [[0, 0], [0, 0]]
    large = Places(100, 2**30)
    large.view(99, Layout((3,), (1,))).fill_(7)
    assert large.view(99, square).tolist() == [[7, 7], [7, 0]]


def test_layout_is_that_of_a_dense_copy() -> None:
    whole = torch.arange(120).reshape(2, 3, 4, 5)
    assert Layout.of(whole) == ((2, 3, 4, 5), (60, 20, 5, 1))
    assert Layout.of(whole.permute(3, 0, 1, 2)) == ((5, 2, 3, 4), (1, 60, 20, 5))
    assert Layout.of(whole[:, :, 1:3]) == ((2, 3, 2, 5), (30, 10, 5, 1))
