"""Read metrics.jsonl in one pass: curves as arrays, events counted and sampled to bound memory."""

import statistics
from array import array
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np

from everest_ds.files import scan_json_lines
from everest_ds.pictures.report.contents import Curve
from everest_ds.train.record.lines import METRICS, is_measurement
from everest_ds.train.record.stored.texts import number_of

_COLUMNS = {
    "train": (
        "loss", "lr", "clips_per_s", "data_wait_ms", "grad_norm", "step_ms", "stalled", "memory_gib", "mfu",
        "epoch", "tokens_per_s",
    ),
    "val": ("top1", "top5", "loss"),
}  # fmt: skip
_MOST_STEPS = 2**53
_KEPT = 12
"""How many events of each kind are kept from the beginning, and how many from the end."""
_CLOSING = frozenset({"end", "stopped", "hang", "weights_differ"})


class Measurements:
    """The measurements and events of a run; lines that are neither are skipped.

    Attributes:
        num_lines: Valid lines.
        num_odd: Invalid lines, without a last line that is still being written.
        num_events: Counts by name of the event.
        first_s: time_s of the first line of kind train, val or event; NaN if there is none.
        last_s: time_s of the last such line.
        last_step: The highest step of such lines; 0 if there are none.
        opening: The last event `start` or `resume`.
        closing: The event after `opening` that ended the run; None if there is none.
        memory: The last event `memory`.
        slow: For each rank, how often it was slow and its worst step time as a multiple of its peers'.
    """

    def __init__(self, run_dir: Path) -> None:
        self.num_lines = self.num_odd = self.last_step = 0
        self.num_events: Counter[str] = Counter()
        self.first_s = self.last_s = float("nan")
        self.opening: dict[str, Any] = {}
        self.closing: dict[str, Any] | None = None
        self.memory: dict[str, Any] = {}
        self.slow: dict[str, tuple[int, float]] = {}
        self._first: dict[str, list[dict[str, Any]]] = {}
        self._last: dict[str, deque[dict[str, Any]]] = {}
        self._steps = {kind: array("d") for kind in _COLUMNS}
        self._values = {kind: [array("d") for _ in names] for kind, names in _COLUMNS.items()}
        path = run_dir / METRICS
        for text, line in scan_json_lines(path, is_measurement) if path.is_file() else ():
            if line is not None and abs(line["step"]) < _MOST_STEPS:
                self._take(line)
            elif text.endswith(b"\n"):
                self.num_odd += 1

    def curve(self, name: str, kind: str = "train") -> Curve | None:
        """Return a column as a curve, from the last line of each step; None if it has no finite number."""
        values = self._values[kind][_COLUMNS[kind].index(name)]
        steps_P, values_P = np.array(self._steps[kind]), np.array(values)
        is_finite = np.isfinite(values_P)
        steps_P, values_P = steps_P[is_finite], values_P[is_finite]
        if not len(steps_P):
            return None
        order = np.argsort(steps_P, kind="stable")
        steps_P, values_P = steps_P[order], values_P[order]
        is_last = np.append(steps_P[1:] != steps_P[:-1], True)
        return Curve(steps_P=steps_P[is_last], values_P=values_P[is_last])

    def last(self, name: str, kind: str = "train") -> float:
        """Return a column's value in the last line; NaN if there is no line."""
        values = self._values[kind][_COLUMNS[kind].index(name)]
        return values[-1] if values else float("nan")

    def median(self, name: str) -> float:
        """Return the median of a column's finite values in lines of kind train; NaN if there are none."""
        finite = [value for value in self._values["train"][_COLUMNS["train"].index(name)] if value == value]
        return statistics.median(finite) if finite else float("nan")

    def events(self) -> list[dict[str, Any]]:
        """Return the first and last events of each kind, sorted by step."""
        kept = [line for name in self._first for line in (*self._first[name], *self._last[name])]
        return sorted(kept, key=lambda line: line["step"])  # stable: events of one kind keep their order

    def _take(self, line: dict[str, Any]) -> None:
        kind, step = line["kind"], line["step"]
        self.num_lines += 1
        if kind in _COLUMNS:
            self._steps[kind].append(step)
            for name, values in zip(_COLUMNS[kind], self._values[kind], strict=True):
                values.append(number_of(line.get(name)))
        if kind not in ("train", "val", "event"):
            return
        time_s = number_of(line.get("time_s"))
        if self.first_s != self.first_s:
            self.first_s = time_s
        self.last_s = time_s
        self.last_step = max(self.last_step, step)
        if kind == "event":
            self._take_event(line)

    def _take_event(self, line: dict[str, Any]) -> None:
        name = str(line.get("event"))[:40]
        self.num_events[name] += 1
        if name in ("start", "resume"):
            self.opening, self.closing = line, None
        elif name in _CLOSING:
            self.closing = line
        elif name == "memory":
            self.memory = line
        elif name == "slow_rank":
            rank, own_ms, peers_ms = (
                str(line.get("rank"))[:20],
                *map(number_of, map(line.get, ("own_ms", "peers_ms"))),
            )
            count, worst = self.slow.get(rank, (0, 1.0))
            self.slow[rank] = count + 1, max(worst, own_ms / peers_ms if own_ms > 0 and peers_ms > 0 else 1.0)
        if len(self.num_events) > 100:  # a foreign file may have any number of names
            return
        first = self._first.setdefault(name, [])
        last = self._last.setdefault(name, deque(maxlen=_KEPT))
        (last if len(first) == _KEPT else first).append(line)
