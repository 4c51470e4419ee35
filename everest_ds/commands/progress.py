"""How far a long command is, said now and then."""

import time
from collections.abc import Iterator
from typing import TypeVar

from everest_ds.train.metrics import format_duration

Item = TypeVar("Item")

_EVERY_S = 10.0


def with_progress(videos: Iterator[Item], total: int) -> Iterator[Item]:
    """Pass on what comes of each of ``total`` videos, and print how many are done, how fast, and what is left."""
    started = said = time.monotonic()
    for done, video in enumerate(videos, start=1):
        yield video
        now = time.monotonic()
        if now - said > _EVERY_S or (done == total and said > started):
            left = format_duration((now - started) / done * (total - done))
            print(f"{done}/{total} videos, {done / (now - started):.1f} a second, {left} left", flush=True)
            said = now
