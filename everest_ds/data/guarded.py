"""Calls of one function with many items, each in a process that is killed when it takes too long.

Place in the flow: items -> processes (`data.pool`) -> outcomes, in the order in which they come.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TypeVar

from everest_ds.data.pool import Mark, Outcome, Pool

__all__ = ["Outcome", "run_guarded"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOOK_AGAIN_S = 60.0


def run_guarded(
    function: Callable[[Item], Result], items: Sequence[Item], *, processes: int, timeout_s: float
) -> Generator[Outcome[Item, Result]]:
    """Call a function with each item, in processes that are killed and replaced when a call takes too long.

    The function must not raise; what it cannot do is for its result to say. It is called once for each item.

    Args:
        function: Can be pickled.
        items: Can be pickled.
        processes: How many calls go at a time.
        timeout_s: Seconds that a call may take.

    Close what is returned when done with it early: that ends the processes.

    Yields:
        An outcome of each item, as they come.
    """
    if not items:
        return
    call = partial(_call, function)
    pool: Pool[Item, Result] = Pool(call, processes=min(processes, len(items)), timeout_s=timeout_s)
    try:
        for item in items:
            pool.submit(item)
        left = len(items)
        while left:
            for outcome in pool.wait(_LOOK_AGAIN_S):
                left -= 1
                yield outcome
    finally:
        pool.close()


def _call(function: Callable[[Item], Result], item: Item, mark: Mark) -> Result:
    return function(item)
