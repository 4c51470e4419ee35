"""`everest`, of which one rank hangs in the way and at the step that the environment names; see test_hangs.py."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from everest_ds import distributed
from everest_ds.cli import main
from everest_ds.train.loop import Trainer
from everest_ds.train.step.device_feed import DeviceFeed
from everest_ds.train.step.updater import FlatUpdater

AT = 5


def loop() -> None:
    while True:
        pass


WAYS: dict[str, Callable[[], object]] = {
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "python": loop,
    "lock": lambda: ctypes.PyDLL(None).sleep(1000),  # in C, with Python's lock
    "loader": lambda: time.sleep(1000),
}


def hang(way: str) -> None:
    """Let this process hang once it takes step AT; to skip a collective is one way."""
    step = 0

    def before(function: Any, act: Callable[[], object]) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            if step == AT:
                act()
            return function(*args, **options)

        return wrapped

    def counted(function: Any) -> Any:
        def take_step(trainer: Trainer, number: int, feed: DeviceFeed) -> None:
            nonlocal step
            step = number
            function(trainer, number, feed)

        return take_step

    Trainer._take_step = counted(Trainer._take_step)  # type: ignore[method-assign]
    if way == "skip":
        agreed = distributed.largest
        distributed.largest = lambda value: value if step == AT else agreed(value)
    elif way == "loader":
        DeviceFeed.next = before(DeviceFeed.next, WAYS[way])  # type: ignore[method-assign]
    else:
        FlatUpdater.forward_backward = before(FlatUpdater.forward_backward, WAYS[way])  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == os.environ["HANGING_RANK"]:
        hang(os.environ["HANG"])
    sys.exit(main())
