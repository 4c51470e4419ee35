"""Reading frames of a video by index, with decord.

Place in the flow: path -> frames_THWC uint8. Every failure, of whatever class decord chooses, is a
`VideoReadError` with the path and the reason.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Seconds before zero beyond which a timestamp is a container's "unknown", not a place in time. AVI files with
# packed B-frames carry about -3e17.
_UNKNOWN_TIME_S = -1e9
_TIME_TOLERANCE_S = 1e-6


class VideoReadError(Exception):
    """A video that cannot be read."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class Video:
    """An open video. Opened in the loader process, used for one clip, then dropped.

    Attributes:
        path: Where it is.
        num_frames: Frames that can be shown. decord's own length counts the frames before an edit list's start as
            well and fills the end with copies of the last frame; those are left out here.

    Raises:
        VideoReadError: The file is missing, is no video, or has no frame to show.
    """

    def __init__(self, path: Path) -> None:
        import decord

        decord.logging.set_level(decord.logging.FATAL)
        self.path = path
        try:
            if path.stat().st_size == 0:
                raise VideoReadError(path, "the file is empty")
            self._reader = decord.VideoReader(str(path), num_threads=1)
            length = len(self._reader)
            start_s = self._reader.get_frame_timestamp(list(range(length)))[:, 0] if length else np.zeros(0)
        except FileNotFoundError as error:
            raise VideoReadError(path, "no such file") from error
        except (OSError, RuntimeError, decord.DECORDError) as error:
            raise VideoReadError(path, _first_line(error)) from error
        self.num_frames = count_presentable(start_s)
        if self.num_frames == 0:
            raise VideoReadError(path, f"none of its {length} frames can be shown")

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames at the given indices, in that order; repeats are allowed.

        Returns:
            frames_THWC, uint8, RGB.

        Raises:
            VideoReadError: A frame cannot be decoded.
            IndexError: An index is not below `num_frames`.
        """
        import decord

        self._require_frames(indices)
        try:
            frames: NDArray[np.uint8] = self._reader.get_batch(list(indices)).asnumpy()
        except (RuntimeError, decord.DECORDError) as error:
            raise VideoReadError(self.path, _first_line(error)) from error
        return frames

    def _require_frames(self, indices: Sequence[int]) -> None:
        if min(indices) < 0 or max(indices) >= self.num_frames:
            raise IndexError(f"{self.path} has {self.num_frames} frames, asked for {list(indices)}")


class DecodedVideo(Video):
    """A video whose frames are all in memory, as bytes; its reader is gone.

    Raises:
        VideoReadError: As `Video`, and where any frame cannot be decoded.
    """

    def __init__(self, path: Path) -> None:
        video = Video(path)
        self.path = path
        self.num_frames = video.num_frames
        self._frames_THWC = video.read(range(video.num_frames))

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames at the given indices; see `Video.read`."""
        self._require_frames(indices)
        return self._frames_THWC[list(indices)]


def count_presentable(start_s: NDArray[np.floating]) -> int:
    """Count the frames that can be shown, from the times in seconds at which they start.

    Frames that start before zero precede an edit list; frames of unknown time count as shown.
    """
    hidden = (start_s < -_TIME_TOLERANCE_S) & (start_s > _UNKNOWN_TIME_S)
    return int(len(start_s) - hidden.sum())


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
