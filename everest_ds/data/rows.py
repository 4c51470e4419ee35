"""Rows of a list in little memory, for processes that get a copy each."""

from collections.abc import Iterable, Sequence
from os import fsdecode, fsencode
from pathlib import Path
from typing import overload

import numpy as np

from everest_ds.data.index import VideoRow


class PackedRows(Sequence[VideoRow]):
    """The rows of a list, without the numbers of their lines, made anew each time that one is asked for.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: Iterable[VideoRow]) -> None:
        rows = list(rows)
        paths = [fsencode(row.path) for row in rows]
        self._paths = b"".join(paths)
        self._ends = np.cumsum([0, *map(len, paths)], dtype=np.int64)
        self._labels = np.array([row.label for row in rows], dtype=np.int64)
        times = [(row.start_s, row.end_s) for row in rows]
        whole = all(time == (None, None) for time in times)
        self._times_s = None if whole else np.array(times, dtype=np.float64)  # NaN where there is no window

    def __len__(self) -> int:
        return len(self._labels)

    @overload
    def __getitem__(self, index: int) -> VideoRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[VideoRow]: ...

    def __getitem__(self, index: int | slice) -> VideoRow | list[VideoRow]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # raises for one that is out of range
        path = Path(fsdecode(self._paths[self._ends[place] : self._ends[place + 1]]))
        label = int(self._labels[place])
        if self._times_s is None or np.isnan(self._times_s[place, 0]):
            return VideoRow(path, label)
        start_s, end_s = self._times_s[place].tolist()
        return VideoRow(path, label, start_s=start_s, end_s=end_s)
