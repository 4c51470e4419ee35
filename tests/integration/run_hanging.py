"""`everest` with a rank that hangs, is slow or has a flipped bit, set by the environment; for test_hangs.py."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.cli import main
from everest_ds.train.loop import Trainer
from everest_ds.train.step.device_feed import DeviceFeed
from everest_ds.train.step.updater import FlatUpdater

AT = 5
"""The step, counted from 0, at which something happens."""
SLOW_S = 0.05


def loop() -> None:
    while True:
        pass


def flip_bit(trainer: Trainer) -> None:
    """Flip the lowest bit of a weight that is replicated on all ranks."""
    weight = next(p for p in trainer.engine.module.parameters() if p.numel() > 1)
    weight.data.view(-1)[:1].view(torch.uint8)[0] ^= 1


IN_FORWARD: dict[str, Callable[[], object]] = {
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "python": loop,
    "lock": lambda: ctypes.PyDLL(None).sleep(1000),  # in C, while holding the GIL
}


def misbehave(way: str) -> None:
    """Inject the fault into this process at step AT, or at every step."""
    step = 0

    def before(function: Any, act: Callable[[], object]) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            if step == AT or way == "slow":
                act()
            return function(*args, **options)

        return wrapped

    def noting(function: Any) -> Any:
        def take_step(trainer: Trainer, number: int, feed: DeviceFeed) -> None:
            nonlocal step
            step = number
            if way == "bit" and step == AT:
                flip_bit(trainer)
            function(trainer, number, feed)

        return take_step

    Trainer._take_step = noting(Trainer._take_step)  # type: ignore[method-assign]
    if way == "skip":
        agreed = distributed.largest
        distributed.largest = lambda value: value if step == AT else agreed(value)
    elif way == "loader":
        DeviceFeed.next = before(DeviceFeed.next, lambda: time.sleep(1000))  # type: ignore[method-assign]
    elif way == "slow":
        FlatUpdater.compute = before(FlatUpdater.compute, lambda: time.sleep(SLOW_S))  # type: ignore[method-assign]
    elif way in IN_FORWARD:
        FlatUpdater.forward_backward = before(FlatUpdater.forward_backward, IN_FORWARD[way])  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == os.environ["AT_FAULT"]:
        misbehave(os.environ["HOW"])
    sys.exit(main())
