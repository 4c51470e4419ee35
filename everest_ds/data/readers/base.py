"""The interface of video readers, and what all readers share.

Place in the flow: `readers.video` opens a reader and asks it for frames. Axes: T requested frames, H W pixels,
C colour.
"""

import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from everest_ds.config.sections import MAX_PIXELS

# The source line with which C++ libraries begin a message: "function, /source/file.cpp:41, " of torchcodec,
# "[12:34:56] /source/file.cc:41: " of decord.
_SOURCE_LINE = re.compile(r"^(?:(?:\[[\d:]+\] |\w+, )\S+\.(?:cpp|cc|h):\d+[:,] )+")


_KEPT_FRAMES = 16
_SETTING = "data.max_pixels (outside training: --max-pixels, where there is one)"

NO_MEMORY = "there is not enough memory to read it"

WAY_OUT = "use --data.reader pyav (outside training: --reader pyav)"
"""What to do about a file that another reader cannot read."""


class VideoReadError(Exception):
    """A video that cannot be read.

    Attributes:
        path: The video.
        reason: Why it cannot be read, in one line.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["VideoReadError"], tuple[Path, str]]:
        """Make the error picklable: its constructor takes two arguments, the default would pass one."""
        return type(self), (self.path, self.reason)


class PixelLimit(NamedTuple):
    """Limit on the pixels of a video that are decoded at a time, and so on its memory.

    Attributes:
        pixels: Frames x height x width.
    """

    pixels: int = MAX_PIXELS

    @property
    def of_frame(self) -> int:
        """Largest number of pixels of one frame: decoders keep up to sixteen frames."""
        return self.pixels // _KEPT_FRAMES

    def require(self, path: Path, num_frames: int, width: int, height: int) -> None:
        """Check frames before they are decoded.

        Raises:
            VideoReadError: They have more pixels than the limit allows.
        """
        if width * height > self.of_frame:
            self.refuse_frame(path, width, height)
        if num_frames * width * height > self.pixels:
            raise VideoReadError(
                path,
                f"{num_frames} frames of {width}x{height} pixels are more at a time than {_SETTING} allows "
                f"({self.pixels})",
            )

    def refuse_frame(self, path: Path, width: int, height: int) -> NoReturn:
        """Raise VideoReadError for a frame of this size; 0 x 0 if the file names no size that FFmpeg accepts."""
        size = f"of {width}x{height} pixels" if width and height else "without a size, or too large ones"
        raise VideoReadError(
            path,
            f"it has frames {size}; {_SETTING} allows {self.of_frame} pixels a frame, a sixteenth of its value",
        )


class Reader(Protocol):
    """A video opened by one library; it is opened for one clip, in the process that uses it, and then closed.

    Hidden frames (before the start of an edit list) are not counted. Frames are rotated and mirrored as the file's
    display matrix says.
    """

    @property
    def num_frames(self) -> int:
        """Number of shown frames, at least 1."""

    def times_s(self) -> NDArray[np.float64]:
        """Return the start time of each frame, float64 seconds from the first one, ascending."""

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames at the given indices of 0 to ``num_frames - 1``, in that order; repeats are allowed.

        Returns:
            frames_THWC, uint8, RGB.

        Raises:
            VideoReadError: A frame cannot be decoded.
        """


def require_file(path: Path) -> None:
    """Check that a video is a regular file, without any library.

    Raises:
        VideoReadError: The file is missing, empty or not a regular file (a folder, a pipe, a device), or the file
            system refuses it.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise VideoReadError(path, "no such file") from error
    except OSError as error:
        raise VideoReadError(path, error.strerror or first_line(error)) from error
    except ValueError as error:  # a zero byte in its name
        raise VideoReadError(path, f"no file can have this name: {error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoReadError(path, "it is a folder, perhaps of frames; only video files are read")
    if not stat.S_ISREG(status.st_mode):  # reading it might never end
        raise VideoReadError(path, "it is a device, a pipe or a socket; only video files are read")
    if status.st_size == 0:
        raise VideoReadError(path, "the file is empty")


def is_lack_of_memory(error: Exception) -> bool:
    """Return whether memory ran out; torch raises a RuntimeError for that."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def even_times_s(num_frames: int, frames_per_s: float) -> NDArray[np.float64]:
    """Return evenly spaced start times in seconds, for containers without usable times."""
    return np.arange(num_frames) / frames_per_s


def first_line(error: Exception) -> str:
    """Return the first line of a library's message without its source line; the error's class if it is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _SOURCE_LINE.sub("", lines[0]) if lines else type(error).__name__
