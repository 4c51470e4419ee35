from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from everest_ds.data.loading.pool import _PRELOADED, Mark, Outcome, Pool, run_all
from everest_ds.errors import UserError
from tests.conftest import REPOSITORY


def act(item: tuple[str, float], mark: Mark) -> float:
    """Answer, hang, fail or end the worker, as the item says."""
    what, number = item
    if what == "marks":  # each of the three parts is within the limit, their sum is not
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
    """Return the signals that are blocked in the worker, as the kernel reports them."""
    status = Path("/proc/self/status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
    return {number for number in range(1, 32) if mask >> (number - 1) & 1}


def test_signals_of_a_terminal_or_launcher_are_left_to_the_parent() -> None:
    """Such signals are sent to whole process trees. Workers inherit a mask, so they are never unprotected."""
    pool: Pool[int, set[int]] = Pool(blocked_signals, num_workers=2, timeout_s=30)
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


class EndsItsProcess:
    """A function whose unpickling ends the worker."""

    def __call__(self, item: object, mark: Mark) -> float:
        return 0.0

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return os._exit, (7,)


def run(items: list[tuple[str, float]], *, timeout_s: float = 30.0, depth: int = 2) -> list[Outcome]:
    pool: Pool[tuple[str, float], float] = Pool(act, num_workers=2, timeout_s=timeout_s, depth=depth)
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
    pool: Pool[tuple[str, float], float] = Pool(act, num_workers=1, timeout_s=30)
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
    pool: Pool[tuple[str, float], float] = Pool(EndsItsProcess(), num_workers=2, timeout_s=30)
    pool.submit(("answer", 1.0))
    try:
        with pytest.raises(RuntimeError, match=r"end before they can begin \(exit code 7\)"):
            pool.wait(60)
    finally:
        pool.close()


def test_closed_pool_leaves_no_process_and_answers_nothing() -> None:
    pool: Pool[tuple[str, float], float] = Pool(act, num_workers=2, timeout_s=600)
    pids = pool.pids
    pool.submit(("hang", 1.0))
    pool.wait(1)
    pool.close()
    assert pool.wait(5) == []
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def act_without_mark(item: tuple[str, int]) -> int:
    """Answer, take long, or end the worker in one of several ways."""
    what, number = item
    if what == "hang":
        time.sleep(600)
    if what == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        os._exit(3)
    return number * number


def run_each(items: Sequence[tuple[str, int]], *, num_workers: int, timeout_s: float = 30.0) -> dict[int, Outcome]:
    outcomes = list(run_all(act_without_mark, items, num_workers=num_workers, timeout_s=timeout_s))
    assert sorted(outcome.item for outcome in outcomes) == sorted(items)  # each item once, none lost
    return {outcome.item[1]: outcome for outcome in outcomes}


def test_every_item_is_answered_once_by_any_number_of_processes() -> None:
    items = [("answer", number) for number in range(4)]
    for num_workers in (1, 2, 9):
        outcomes = run_each(items, num_workers=num_workers)
        assert {number: outcome.result for number, outcome in outcomes.items()} == {n: n * n for n in range(4)}
        assert all(outcome.fault is None and not outcome.hung for outcome in outcomes.values())
    assert run_each([], num_workers=2) == {}


def test_call_that_hangs_is_killed_and_the_others_are_answered() -> None:
    items = [("answer", 0), ("hang", 1), ("answer", 2), ("hang", 3), ("answer", 4)]
    started = time.monotonic()
    outcomes = run_each(items, num_workers=2, timeout_s=1.0)
    assert time.monotonic() - started < 60
    assert [outcomes[n].hung for n in range(5)] == [False, True, False, True, False]
    assert outcomes[1].fault == "no answer within 1 s"
    assert 1.0 <= outcomes[1].took_s < 10
    assert [outcomes[n].result for n in (0, 2, 4)] == [0, 4, 16]


def test_call_that_ends_its_process_says_how_and_the_others_are_answered() -> None:
    outcomes = run_each([("signal", 0), ("answer", 1), ("exit", 2), ("answer", 3)], num_workers=1)
    assert outcomes[0].fault == "it ended its process (signal 11)"
    assert outcomes[2].fault == "it ended its process (exit code 3)"
    assert not outcomes[0].hung
    assert [outcomes[n].result for n in (1, 3)] == [1, 9]


def test_leaving_early_leaves_no_process_behind() -> None:
    outcomes = run_all(act_without_mark, [("answer", 1), ("hang", 2), ("hang", 3)], num_workers=2, timeout_s=60)
    assert next(outcomes).result == 1
    started = time.monotonic()
    outcomes.close()
    assert time.monotonic() - started < 10


def test_modules_that_the_fork_server_imports_exist() -> None:
    """The fork server ignores a module that does not exist; then each worker would spend seconds on imports."""
    assert all(importlib.util.find_spec(name) for name in _PRELOADED)


def hold_python_in_c(item: int, mark: Mark) -> None:
    """Hang in C with Python's lock held, like a decoder, so that no other thread of the worker can run."""
    mark(os.getpid())
    ctypes.PyDLL(None).sleep(300)


OWNER_OF_A_POOL = """
import time
from everest_ds.data.loading.pool import Pool
from tests.unit.data.loading.test_pool import hold_python_in_c
pool = Pool(hold_python_in_c, num_workers=1, timeout_s=300)
pool.submit(0)
while pool._workers[0]._mark is None:
    pool.wait(0.1)
print(*pool.pids, flush=True)
time.sleep(300)
"""


def test_process_stuck_in_c_ends_with_the_one_that_the_pool_belongs_to() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER_OF_A_POOL], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as owner:
        assert owner.stdout is not None
        worker = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
        owner.wait()
        until = time.monotonic() + 5
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.02)
