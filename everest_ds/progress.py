"""How far a long command is, said now and then."""

import time
from collections.abc import Iterator
from typing import TypeVar

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


def format_duration(seconds: float) -> str:
    """Return a duration as people read it: ``2d03h``, ``4h05m``, ``12m30s``, ``9s``."""
    whole = max(round(seconds), 0)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
