"""Compact storage of a list's rows in memory that workers share; a `VideoRow` is built when it is accessed.

Five million rows as objects would take gigabytes in every process. Here a row takes the bytes of its path and 16
more, 32 if the list has windows, in memory that the workers of a rank map without a copy.
"""

import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from multiprocessing import context, reduction
from os import fsdecode, fsencode
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from everest_ds.data.lists.video_row import VideoRow

_CHUNK_ROWS = 100_000
_NO_LINE = 0


class RowChunk(NamedTuple):
    """Some rows in packed form.

    Attributes:
        paths: Concatenated bytes of their paths.
        lengths: Bytes of each path.
        labels: Classes; each fits in 32 bits.
        lines: Line numbers in the list, from 1; 0 without a list.
        times_s: Start and end of each window, of shape (rows, 2), NaN for a row without one; None if none has one.
    """

    paths: bytes
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]
    lines: NDArray[np.int64]
    times_s: NDArray[np.float64] | None


class PackedRows(Sequence[VideoRow]):
    """The rows of a list; `packed` builds one from `VideoRow` objects.

    Args:
        chunks: The rows, in order; each chunk is dropped before the next is taken.
        folder: Folder that relative paths start from.

    Attributes:
        labels: int32, the class of each row.
    """

    labels: NDArray[np.int32]

    def __init__(self, chunks: Iterable[RowChunk], folder: Path = Path()) -> None:
        file = os.memfd_create("everest-rows")
        try:
            self._map(file, folder, *_write(file, chunks))
        except BaseException:
            os.close(file)
            raise

    def _map(self, file: int, folder: Path, num_bytes: int, num_rows: int, has_times: bool) -> None:
        """Map the memory of a file as arrays; the file is closed with this object."""
        weakref.finalize(self, os.close, file)
        self._file, self._folder, self._shape = file, folder, (num_bytes, num_rows, has_times)
        start = _aligned(num_bytes)
        memory = (
            mmap.mmap(file, start + num_rows * (32 if has_times else 16), access=mmap.ACCESS_READ)
            if num_rows
            else b""
        )
        self._paths = memoryview(memory)
        self._stops = np.frombuffer(memory, np.int64, num_rows, start if num_rows else 0)
        self.labels, self._lines = (
            np.frombuffer(memory, np.int32, num_rows, start + num_rows * place if num_rows else 0)
            for place in (8, 12)
        )
        self._times_s: NDArray[np.float64] | None = None
        if has_times:
            self._times_s = np.frombuffer(memory, np.float64, 2 * num_rows, start + num_rows * 16).reshape(-1, 2)

    @property
    def memory(self) -> tuple[int, str, tuple[int, int, bool]]:
        """Arguments of `of_memory`: the descriptor of the rows' memory, the folder, and sizes."""
        return self._file, str(self._folder), self._shape

    @classmethod
    def of_memory(cls, file: int, folder: str, num_bytes: int, num_rows: int, has_times: bool) -> "PackedRows":
        """Return the rows in memory that another process created; the descriptor is closed with them."""
        rows = cls.__new__(cls)
        rows._map(file, Path(folder), num_bytes, num_rows, has_times)
        return rows

    def __reduce__(self) -> tuple[Callable[..., "PackedRows"], tuple[Any, ...]]:
        """Share the memory with a process that is being started; pickle a copy in all other cases."""
        if context.get_spawning_popen() is not None:
            return _reopen, (reduction.DupFd(self._file), str(self._folder), *self._shape)
        return _copy, (bytes(self._paths), str(self._folder), *self._shape)

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> VideoRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[VideoRow]: ...

    def __getitem__(self, index: int | slice) -> VideoRow | list[VideoRow]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # raises for one that is out of range
        start = int(self._stops[row - 1]) if row else 0
        path = self._folder / fsdecode(bytes(self._paths[start : int(self._stops[row])]))
        label, line = int(self.labels[row]), int(self._lines[row])
        if self._times_s is None or np.isnan(self._times_s[row, 0]):
            return VideoRow(path, label, line or None)
        return VideoRow(path, label, line or None, *self._times_s[row].tolist())

    def __iter__(self) -> Iterator[VideoRow]:
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Compare row by row, with any sequence of rows."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def chunks(self) -> Iterator[tuple[list[bytes], NDArray[np.int32], NDArray[np.float64] | None]]:
        """Yield the paths as in the list, labels and windows of 100,000 rows at a time."""
        for start in range(0, len(self), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            first = int(self._stops[start - 1]) if start else 0
            places = [first, *self._stops[part].tolist()]
            paths = os.pread(self._file, places[-1] - first, first)
            parts = [paths[begin - first : end - first] for begin, end in pairwise(places)]
            yield parts, self.labels[part], None if self._times_s is None else self._times_s[part]

    def kept(self, keep: NDArray[np.bool_]) -> "PackedRows":
        """Return the rows for which ``keep`` is true."""

        def chosen_chunks() -> Iterator[RowChunk]:
            """Yield the kept rows of each chunk."""
            for number, (paths, labels, times_s) in enumerate(self.chunks()):
                part = slice(number * _CHUNK_ROWS, number * _CHUNK_ROWS + len(paths))
                chosen = np.flatnonzero(keep[part])
                some = [paths[row] for row in chosen]
                yield RowChunk(
                    b"".join(some),
                    np.fromiter(map(len, some), np.int64, len(some)),
                    labels[chosen].astype(np.int64),
                    self._lines[part][chosen].astype(np.int64),
                    None if times_s is None else times_s[chosen],
                )

        return PackedRows(chosen_chunks(), self._folder)


def packed(rows: Iterable[VideoRow]) -> PackedRows:
    """Return rows in packed form; packed rows are returned as they are."""
    if isinstance(rows, PackedRows):
        return rows
    rows = list(rows)
    paths = [fsencode(row.path) for row in rows]
    times = [(row.start_s, row.end_s) for row in rows]
    whole = all(time == (None, None) for time in times)
    chunk = RowChunk(
        b"".join(paths),
        np.array([len(path) for path in paths], np.int64),
        np.array([row.label for row in rows], np.int64),
        np.array([row.line or _NO_LINE for row in rows], np.int64),
        None if whole else np.array(times, np.float64),
    )
    return PackedRows([chunk])


def _write(file: int, chunks: Iterable[RowChunk]) -> tuple[int, int, bool]:
    """Write rows to a file; return the bytes of all paths, the number of rows, and whether any has a window."""
    num_bytes = 0
    stops, labels, lines, times_s = [], [], [], []
    for chunk in chunks:
        _write_all(file, chunk.paths)
        stops.append(num_bytes + np.cumsum(chunk.lengths))
        num_bytes += len(chunk.paths)
        labels.append(chunk.labels.astype(np.int32))
        lines.append(chunk.lines.astype(np.int32))
        times_s.append((len(chunk.lengths), chunk.times_s))
    num_rows = sum(map(len, labels))
    has_times = any(times is not None for _, times in times_s)
    _write_all(file, bytes(_aligned(num_bytes) - num_bytes))
    for part in (*stops, *labels, *lines):
        _write_all(file, part)
    for count, times in times_s if has_times else ():
        _write_all(file, np.full((count, 2), np.nan) if times is None else times)
    return num_bytes, num_rows, has_times


def _write_all(file: int, content: Any) -> None:
    view = memoryview(content).cast("B") if len(content) else memoryview(b"")  # empty arrays cannot be cast
    while len(view):
        view = view[os.write(file, view) :]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 8) * 8


def _reopen(file: Any, folder: str, *shape: Any) -> PackedRows:
    return PackedRows.of_memory(file.detach(), folder, *shape)


def _copy(content: bytes, folder: str, *shape: Any) -> PackedRows:
    file = os.memfd_create("everest-rows")
    _write_all(file, content)
    return PackedRows.of_memory(file, folder, *shape)
