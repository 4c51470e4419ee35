"""What this process is doing, and when it last made progress. `everest_ds.train.watch` reads it. A leaf.

The training loop enters phases. Code that makes progress inside a phase, for example the loader, calls `beat`.
"""

import time
from dataclasses import dataclass, field


@dataclass
class Pulse:
    """The progress of a process.

    Attributes:
        phase: What the process is doing, in words.
        position: Number of phases entered so far. All ranks of a run enter the same phases.
        spent_s: Seconds spent in each phase so far, without the current one.
        began: Start of the current phase, in seconds of time.monotonic.
        at: Time of the last progress, by the same clock.
    """

    phase: str = "starting"
    position: int = 0
    spent_s: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    at: float = field(default_factory=time.monotonic)


WAITING_FOR_CLIPS = "waiting for clips"
PULSE = Pulse()


def enter(phase: str) -> None:
    """Begin a phase."""
    now, before = time.monotonic(), PULSE.phase
    PULSE.spent_s[before] = PULSE.spent_s.get(before, 0.0) + now - PULSE.began
    PULSE.phase, PULSE.position, PULSE.began, PULSE.at = phase, PULSE.position + 1, now, now


def beat() -> None:
    """Record progress within a phase; may be called from any thread."""
    PULSE.at = time.monotonic()
