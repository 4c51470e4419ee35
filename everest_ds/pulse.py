"""What this process is doing, and when it last got further: signs that `everest_ds.train.watch` looks at. A leaf.

The loop enters its phases; whatever works on inside one, as the loader does, beats.
"""

import time
from dataclasses import dataclass, field


@dataclass
class Pulse:
    """Of a process.

    Attributes:
        phase: What it is doing, in words.
        position: Phases entered so far; the ranks of a training enter the same ones.
        spent_s: Seconds spent in each phase so far, without the present one.
        began: When the present one began, by the clock of time.monotonic.
        at: When the process last got further, by the same clock.
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
    """Get further within a phase; from any thread."""
    PULSE.at = time.monotonic()
