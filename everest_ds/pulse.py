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
        at: When it last got further, by the clock of time.monotonic.
    """

    phase: str = "starting"
    position: int = 0
    at: float = field(default_factory=time.monotonic)


PULSE = Pulse()


def enter(phase: str) -> None:
    """Begin a phase."""
    PULSE.phase, PULSE.position, PULSE.at = phase, PULSE.position + 1, time.monotonic()


def beat() -> None:
    """Get further within a phase; from any thread."""
    PULSE.at = time.monotonic()
