"""Reading frames of a video, or of a window of it, by index.

Place in the flow: path -> frames_THWC uint8. With every library, a failure is a `VideoReadError` with the path and
the reason.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from everest_ds.config.sections import MAX_PIXELS, ReaderName
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.base import NO_MEMORY, WAY_OUT, PixelLimit, VideoReadError, first_line
from everest_ds.data.readers.choice import open_reader
from everest_ds.data.readers.timing import TIME_TOLERANCE_S
from everest_ds.errors import UserError

__all__ = ["DecodedVideo", "Video", "VideoReadError", "fault_of_the_video", "frames_of_window"]


class Video:
    """An open video, or a window of it: opened in a worker, used for the clips of one request, then dropped.

    Args:
        path: The video.
        reader: The library that reads it.
        max_pixels: Pixels that may be decoded at a time; see `everest_ds.data.readers.base.PixelLimit`.
        start_s: Only frames that start at this time or later, in seconds from the first frame; None for all.
        end_s: Only frames that start before this time, in seconds from the first frame; None for all.

    Attributes:
        num_frames: Shown frames of the window.

    Raises:
        VideoReadError: The file is missing, is not a video, or shows no frame, in its window or at all.
        UserError: The reader is not available on this machine.
    """

    def __init__(
        self,
        path: Path,
        *,
        reader: ReaderName = "auto",
        max_pixels: int = MAX_PIXELS,
        start_s: float | None = None,
        end_s: float | None = None,
    ) -> None:
        self.path = path
        try:
            with fault_of_the_video(path):
                self._reader = open_reader(path, reader, PixelLimit(max_pixels))
        except UnicodeEncodeError as error:  # decord and torchcodec take names as UTF-8 alone
            raise VideoReadError(path, f"its name is not UTF-8; rename it, or {WAY_OUT}") from error
        self._first, self.num_frames = 0, self._reader.num_frames
        if start_s is None and end_s is None:
            return
        with fault_of_the_video(path):
            window = frames_of_window(path, self._reader.times_s(), start_s, end_s)
        self._first, self.num_frames = window.start, len(window)

    @staticmethod
    def of_row(row: VideoRow, reader: ReaderName, max_pixels: int = MAX_PIXELS) -> "Video":
        """Open the video of a list's row, or its window if the row has one."""
        return Video(row.path, reader=reader, max_pixels=max_pixels, start_s=row.start_s, end_s=row.end_s)

    def times_s(self) -> NDArray[np.float64]:
        """Return the start of each frame of the window, float64 seconds from its first frame, ascending."""
        with fault_of_the_video(self.path):
            times_s = self._reader.times_s()[self._first : self._first + self.num_frames]
            return times_s - times_s[0]

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames at the given indices, in that order; repeats are allowed.

        Returns:
            frames_THWC, uint8, RGB.

        Raises:
            VideoReadError: A frame cannot be decoded.
            IndexError: An index is not below `num_frames`.
        """
        self._require_frames(indices)
        with fault_of_the_video(self.path):
            return self._reader.read([self._first + index for index in indices])

    def _require_frames(self, indices: Sequence[int]) -> None:
        if min(indices) < 0 or max(indices) >= self.num_frames:
            raise IndexError(f"{self.path} has {self.num_frames} frames, asked for {list(indices)}")


@contextlib.contextmanager
def fault_of_the_video(path: Path) -> Iterator[None]:
    """Turn any exception of a library, also lack of memory, into a `VideoReadError`."""
    try:
        yield
    except (VideoReadError, UserError, UnicodeEncodeError):
        raise
    except MemoryError as error:
        raise VideoReadError(path, NO_MEMORY) from error
    except Exception as error:
        raise VideoReadError(path, f"{type(error).__name__}: {first_line(error)}") from error


def frames_of_window(path: Path, times_s: NDArray[np.float64], start_s: float | None, end_s: float | None) -> range:
    """Return the frames that start in a window of seconds; ``times_s`` are the starts of all frames.

    Raises:
        VideoReadError: No frame starts in the window.
    """
    window_s = (0.0 if start_s is None else start_s, float("inf") if end_s is None else end_s)
    first, stop = (int(place) for place in np.searchsorted(times_s, np.array(window_s) - TIME_TOLERANCE_S))
    if stop <= first:
        raise VideoReadError(
            path,
            f"no frame starts in its window [{window_s[0]:g}, {window_s[1]:g}) s; the last of its "
            f"{len(times_s)} frames starts at {times_s[-1]:.3f} s",
        )
    return range(first, stop)


class DecodedVideo(Video):
    """A video whose window is decoded into memory, as uint8; frame times are kept only ``with_times``.

    Raises:
        VideoReadError: A frame cannot be decoded.
    """

    def __init__(self, video: Video, *, with_times: bool = False) -> None:
        self.path = video.path
        self.num_frames = video.num_frames
        self._times_s = video.times_s() if with_times else None
        self._frames_THWC = video.read(range(video.num_frames))

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        self._require_frames(indices)
        return self._frames_THWC[list(indices)]

    def times_s(self) -> NDArray[np.float64]:
        if self._times_s is None:
            raise ValueError(f"{self.path}: the times of its frames were not kept")
        return self._times_s
