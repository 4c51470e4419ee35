"""The options of `everest benchmark flops`, known before torch is imported."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FlopsOptions:
    """Count multiply-accumulates by a profiler and print them beside the paper's tables."""

    json: bool = False
    """One JSON line a row instead of a table."""
