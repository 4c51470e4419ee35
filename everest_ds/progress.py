"""Progress lines of long commands. A leaf."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from everest_ds.console.messages import say

Item = TypeVar("Item")

EVERY_S = 10.0
"""Seconds between two lines. Work that ends sooner prints nothing."""


class Progress:
    """Prints lines like ``scored 120/400 videos  3.1 videos/s  ETA 1m30s``.

    Args:
        total: Number of videos.
        what: Words before the numbers, for example "scored".
    """

    def __init__(self, total: int, what: str = "") -> None:
        self._total = total
        self._what = f"{what} " if what else ""
        self._started = self._printed = time.monotonic()

    def show(self, done: int) -> None:
        """Print how many videos are done, if `EVERY_S` have passed; the last line only if there was one before."""
        now = time.monotonic()
        is_end = done >= self._total and self._printed > self._started
        if not done or (now - self._printed < EVERY_S and not is_end):
            return
        self._printed = now
        per_s = done / max(now - self._started, 1e-9)
        left = format_duration((self._total - done) / per_s)
        say(f"{self._what}{done}/{self._total} videos  {per_s:.1f} videos/s  ETA {left}")


def with_progress(videos: Iterable[Item], total: int) -> Iterator[Item]:
    """Yield ``total`` items, one for each video, and print the progress."""
    progress = Progress(total)
    for done, video in enumerate(videos, start=1):
        yield video
        progress.show(done)


def format_duration(seconds: float) -> str:
    """Return a duration as text: ``2d03h``, ``4h05m``, ``12m30s``, ``9s``."""
    minutes, secs = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
