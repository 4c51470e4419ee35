"""When Python collects garbage during training: at fixed steps, on all ranks alike, and never in between.

A full collection walks over every object of the process, some million after the imports; where one rank collects,
all others wait for it in the next collective.
"""

import contextlib
import gc
from collections.abc import Iterator

STEPS_BETWEEN = 50


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Stop automatic collections, and leave what lives already out of every later one, until the block ends."""
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
    """Collect what became garbage since `held` began, where it is time to."""
    if step % STEPS_BETWEEN == 0:
        gc.collect()
