"""What a reader of videos is, and what all of them have in common.

Place in the flow: `readers.video` opens a reader and asks it for frames. Axes: T frames asked for, H W
pixels, C colour.
"""

import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from everest_ds.config.sections import MAX_PIXELS

# Where a C++ library says at what time and on which line of its own it stands: "function, /source/file.cpp:41, " of
# torchcodec, "[12:34:56] /source/file.cc:41: " of decord.
_SOURCE_LINE = re.compile(r"^(?:(?:\[[\d:]+\] |\w+, )\S+\.(?:cpp|cc|h):\d+[:,] )+")


_KEPT_FRAMES = 16
_SETTING = "data.max_pixels (outside training: --max-pixels, where there is one)"

NO_MEMORY = "there is not enough memory to read it"

WAY_OUT = "use --data.reader pyav (outside training: --reader pyav)"
"""What to do about a file that another reader cannot read."""


class VideoReadError(Exception):
    """A video that cannot be read.

    Attributes:
        path: Where it is.
        reason: Why, in one line.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["VideoReadError"], tuple[Path, str]]:
        """Let it pass from process to process."""
        return type(self), (self.path, self.reason)


class PixelLimit(NamedTuple):
    """How many pixels may be decoded of a video at a time, and so how much memory it may take.

    Attributes:
        pixels: Frames x height x width.
    """

    pixels: int = MAX_PIXELS

    @property
    def of_frame(self) -> int:
        """Pixels of one frame, at most: decoders keep up to sixteen."""
        return self.pixels // _KEPT_FRAMES

    def require(self, path: Path, num_frames: int, width: int, height: int) -> None:
        """Check what is about to be decoded.

        Raises:
            VideoReadError: It is too much.
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
        """Refuse a frame of so many pixels; 0 where the file says none that FFmpeg takes."""
        size = f"of {width}x{height} pixels" if width and height else "without a size, or too large ones"
        raise VideoReadError(
            path,
            f"it has frames {size}; {_SETTING} allows {self.of_frame} pixels a frame, a sixteenth of its number",
        )


class Reader(Protocol):
    """An open video, as one library reads it. Opened where it is used, for one clip, and dropped.

    Frames that are not to be shown (before the start of an edit list) do not count. Pictures are turned and
    mirrored as the file's display matrix asks for.
    """

    @property
    def num_frames(self) -> int:
        """Frames that can be shown, at least 1."""

    def times_s(self) -> NDArray[np.float64]:
        """Return when each of these frames starts, float64 seconds from the first one, ascending."""

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames at the given indices of 0 to ``num_frames - 1``, in that order; repeats are allowed.

        Returns:
            frames_THWC, uint8, RGB.

        Raises:
            VideoReadError: A frame cannot be decoded.
        """


def require_file(path: Path) -> None:
    """Check what needs no library.

    Raises:
        VideoReadError: The file is missing, empty or no file (a folder, a pipe, a device), or the file system
            refuses it.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise VideoReadError(path, "no such file") from error
    except OSError as error:
        raise VideoReadError(path, error.strerror or first_line(error)) from error
    except ValueError as error:  # a zero byte in its name
        raise VideoReadError(path, f"no file can have its name: {error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoReadError(path, "it is a folder, of frames perhaps; only video files are read")
    if not stat.S_ISREG(status.st_mode):  # reading it might never end
        raise VideoReadError(path, "it is a device, a pipe or a socket; only video files are read")
    if status.st_size == 0:
        raise VideoReadError(path, "the file is empty")


def is_lack_of_memory(error: Exception) -> bool:
    """Say whether memory ran out: torch raises a RuntimeError for that."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def even_times_s(num_frames: int, frames_per_s: float) -> NDArray[np.float64]:
    """Return the times in seconds of frames that the container gives no true times for: one after another."""
    return np.arange(num_frames) / frames_per_s


def first_line(error: Exception) -> str:
    """Return what a library's message begins with, in one line; the error's class where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _SOURCE_LINE.sub("", lines[0]) if lines else type(error).__name__
