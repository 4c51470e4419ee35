"""Reading videos with decord 0.6, the default.

decord applies a file's rotation itself. Its length counts the frames before an edit list's start as well and fills
the end with copies of the last frame; those are left out here. It hands no frames out that are 1, 16, 24, 48 or 72
pixels wide (tried: 1 and the even widths from 16 to 400), and knows no AV1: both are errors that name the reader
that can. In HEVC, transport streams and AVI with B-frames its seeks may miss by some frames
(tests/unit/test_readers.py).
"""

from collections.abc import Sequence
from pathlib import Path

import decord
import numpy as np
import torch.utils.dlpack
from numpy.typing import NDArray

from everest_ds.data.readers.base import VideoReadError, even_times_s, first_line

# Seconds before zero beyond which a timestamp is a container's "unknown", not a place in time. AVI files with
# packed B-frames carry about -3e17.
_UNKNOWN_TIME_S = -1e9
_TIME_TOLERANCE_S = 1e-6


class DecordReader:
    """An open video; see `everest_ds.data.readers.base.Reader`."""

    def __init__(self, path: Path) -> None:
        decord.logging.set_level(decord.logging.FATAL)
        self._path = path
        try:
            # Absolute, since FFmpeg takes the text before a colon, as in "10:30.mp4", for a protocol.
            self._reader = decord.VideoReader(str(path.absolute()), num_threads=1)
            length = len(self._reader)
            start_s = self._reader.get_frame_timestamp(range(length))[:, 0] if length else np.zeros(0)
        except (OSError, RuntimeError, decord.DECORDError) as error:
            raise VideoReadError(path, _reason(error)) from error
        self._start_s = start_s
        self.num_frames = count_presentable(start_s)
        if self.num_frames == 0:
            raise VideoReadError(path, f"none of its {length} frames can be shown")

    def times_s(self) -> NDArray[np.float64]:
        """Return when each frame starts; where some times are unknown, all are taken to be evenly spaced."""
        if (self._start_s <= _UNKNOWN_TIME_S).any():
            return even_times_s(self.num_frames, self._reader.get_avg_fps())
        shown_s = self._start_s[len(self._start_s) - self.num_frames :].astype(np.float64)
        return shown_s - shown_s[0]

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames at the given indices."""
        try:
            batch = self._reader.get_batch(list(indices))
        except (RuntimeError, decord.DECORDError) as error:
            raise VideoReadError(self._path, _reason(error)) from error
        # Handed over, where asnumpy would copy it all.
        frames: NDArray[np.uint8] = torch.utils.dlpack.from_dlpack(batch.to_dlpack()).numpy()
        return frames


def count_presentable(start_s: NDArray[np.floating]) -> int:
    """Count the frames that can be shown, from the times in seconds at which they start.

    Frames that start before zero precede an edit list; frames of unknown time count as shown.
    """
    hidden = (start_s < -_TIME_TOLERANCE_S) & (start_s > _UNKNOWN_TIME_S)
    return int(len(start_s) - hidden.sum())


def _reason(error: Exception) -> str:
    """Return decord's own reason, and what it means where it is known."""
    text = first_line(error)
    if "cannot find video stream" in text:
        return f"{text} (no video in it, or AV1, which decord does not know; data.reader=pyav reads AV1)"
    if "size must exactly match" in str(error):
        return f"decord cannot hand out frames of this width; data.reader=pyav reads them ({text})"
    return text
