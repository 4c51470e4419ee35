"""Reading frames of a video, or of a window of it, by index.

Place in the flow: path -> frames_THWC uint8. Whichever library decodes, every failure is a `VideoReadError` with
the path and the reason.
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
    """An open video. Opened in a worker, used for one clip, then dropped.

    Args:
        path: Where it is.
        reader: The library that reads it.
        max_pixels: Pixels that may be decoded at a time; see `everest_ds.data.readers.base.PixelLimit`.
        start_s: Only frames that start at this time or later, in seconds from the first frame; None for all.
        end_s: Only frames that start before this time, in seconds from the first frame; None for all.

    Attributes:
        num_frames: Frames of the window that can be shown.

    Raises:
        VideoReadError: The file is missing, is no video, or has no frame to show, in its window or at all.
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
        """Open the video of a list's row, or the window of it that the row names."""
        return Video(row.path, reader=reader, max_pixels=max_pixels, start_s=row.start_s, end_s=row.end_s)

    def times_s(self) -> NDArray[np.float64]:
        """Return when each frame of the window starts, float64 seconds from its first one, ascending."""
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
    """Turn what libraries raise for odd files, of any kind and no memory among it, into a `VideoReadError`."""
    try:
        yield
    except (VideoReadError, UserError, UnicodeEncodeError):
        raise
    except MemoryError as error:
        raise VideoReadError(path, NO_MEMORY) from error
    except Exception as error:
        raise VideoReadError(path, f"{type(error).__name__}: {first_line(error)}") from error


def frames_of_window(path: Path, times_s: NDArray[np.float64], start_s: float | None, end_s: float | None) -> range:
    """Return which frames of a video are in a window of seconds, from the times at which all its frames start.

    Raises:
        VideoReadError: None is.
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
    """A video whose window is decoded into memory, as bytes; the times of its frames are kept on request.

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
