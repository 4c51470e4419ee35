"""How weights differ from a model, and the report on what was loaded.

Place in the flow: `reading` and `loading` compare names and shapes here, and decide what to accept.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everest_ds.errors import escaped

MAX_NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What was loaded from weights.

    Attributes:
        source: Their path, model and layout.
        loaded: The model's tensors that were loaded.
        fresh: The model's tensors that were not.
        interpolated: What was resampled from one grid of tokens to another.
        ignored: What is in the source but not used.
        notes: Further lines.
    """

    source: str
    loaded: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    interpolated: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the printed report."""
        total = len(self.loaded) + len(self.fresh)
        lines = [
            f"weights of {self.source}",
            f"  loaded        {len(self.loaded)} of {total} tensors",
            f"  left fresh    {_grouped(self.fresh)}",
            f"  interpolated  {', '.join(self.interpolated) or 'none'}",
            f"  ignored       {_grouped(self.ignored)}",
        ]
        return "\n".join(map(escaped, lines + [f"  note          {note}" for note in self.notes]))


def compare(
    expected: Mapping[str, torch.Size], given: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Return the names that are missing, those that are unknown, and those whose shapes differ."""
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    misshapen = [name for name in expected if name in given and given[name].shape != expected[name]]
    return missing, extra, misshapen


def is_allowed(name: str, allow: Collection[str]) -> bool:
    """Return whether a name, or a module that it belongs to, is allowed."""
    return any(name == entry or name.startswith(f"{entry}.") for entry in allow)


def unneeded(allow: Collection[str], used: Sequence[str]) -> tuple[str, ...]:
    """Return a note on entries of ``allow`` that had no effect."""
    idle = [entry for entry in allow if not any(is_allowed(name, [entry]) for name in used)]
    return (f"allowed but not needed: {', '.join(idle)}",) if idle else ()


def part_of(name: str) -> str:
    """Return the part of the model that a name belongs to: decoder, encoder.norm, fc_norm, ..."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "encoder" else parts[0]


def _grouped(names: Sequence[str]) -> str:
    """Return each part and its number of tensors."""
    counts = Counter(part_of(name) for name in names)
    return ", ".join(f"{part} ({n})" if n > 1 else part for part, n in counts.items()) or "none"


def describe_difference(source: str, missing: Sequence[str], unknown: Sequence[str], way_out: str) -> str:
    """Return a message on missing and unknown names; the parts' names follow a ``way_out`` with a flag."""
    parts = [f"lacks {_few(missing)}"] if missing else []
    if unknown:
        parts.append(f"has {_few(unknown)}, which the model does not")
    names = dict.fromkeys(part_of(name) for name in [*missing, *unknown])
    words = f" {' '.join(names)}" if "--" in way_out else ""
    return f"{source} {' and '.join(parts)}; {way_out}{words}"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return f"{', '.join(names[:MAX_NAMES_SHOWN])}{more}"


def describe_shapes(source: str, name: str, given: torch.Size, expected: torch.Size) -> str:
    """Return how a tensor's shape differs."""
    return f"{source}: {name} has shape {tuple(given)}, this model's has {tuple(expected)}"
