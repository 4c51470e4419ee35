"""Lets Python collect garbage during training only at fixed steps, the same on all ranks.

A full collection walks over every object of the process, about a million after the imports. If one rank collects,
all others wait for it in the next collective.
"""

import contextlib
import gc
from collections.abc import Iterator

STEPS_BETWEEN = 50


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside this block, stop automatic collections, and exclude existing objects from the explicit ones."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect_after(step: int) -> None:
    """Every `STEPS_BETWEEN` steps, collect the garbage that appeared inside `held`."""
    if step % STEPS_BETWEEN == 0:
        gc.collect()
