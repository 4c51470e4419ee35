"""How far a long command is, printed now and then. A leaf."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from everest_ds.console.messages import say

Item = TypeVar("Item")

EVERY_S = 10.0
"""Seconds from one line to the next; what ends sooner prints nothing."""


class Progress:
    """Prints lines like ``scored 120/400 videos  3.1 videos/s  ETA 1m30s``.

    Args:
        total: Videos in all.
        what: What is being done, before the numbers.
    """

    def __init__(self, total: int, what: str = "") -> None:
        self._total = total
        self._what = f"{what} " if what else ""
        self._started = self._printed = time.monotonic()

    def show(self, done: int) -> None:
        """Print how many videos are done, if it is time to; the end is printed if anything was."""
        now = time.monotonic()
        is_end = done >= self._total and self._printed > self._started
        if not done or (now - self._printed < EVERY_S and not is_end):
            return
        self._printed = now
        per_s = done / max(now - self._started, 1e-9)
        left = format_duration((self._total - done) / per_s)
        say(f"{self._what}{done}/{self._total} videos  {per_s:.1f} videos/s  ETA {left}")


def with_progress(videos: Iterable[Item], total: int) -> Iterator[Item]:
    """Pass on ``total`` items, one a video, and print how far that is."""
    progress = Progress(total)
    for done, video in enumerate(videos, start=1):
        yield video
        progress.show(done)


def format_duration(seconds: float) -> str:
    """Return a duration as people read it: ``2d03h``, ``4h05m``, ``12m30s``, ``9s``."""
    minutes, secs = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
