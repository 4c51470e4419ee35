"""Reading videos with decord 0.6.

decord seeks to a keyframe and counts frames from there. In many kinds of files this returns a wrong frame without
an error: `supported` lists the kinds that it reads correctly, and all others are refused. It applies the rotation
of a display matrix in MP4 and MOV only; the rest is done here. It cannot return frames that are 1, 16, 24, 48 or 72
pixels wide (tested: 1 and the even widths from 16 to 400), and cannot decode AV1.
"""

from collections.abc import Sequence
from pathlib import Path

import decord
import numpy as np
import torch.utils.dlpack
from numpy.typing import NDArray

from everest_ds.data.readers.base import WAY_OUT, PixelLimit, VideoReadError, first_line
from everest_ds.data.readers.supported import SupportedFile

# decord's times are float32 seconds; frames are further apart.
_TIME_TOLERANCE_S = 2e-3
# Larger times are FFmpeg's "unknown": decord does not know the times of very short Matroska files.
_UNKNOWN_TIME_S = 1e9


class DecordReader(SupportedFile):
    """An open video; see `everest_ds.data.readers.base.Reader`."""

    def __init__(self, path: Path, limit: PixelLimit) -> None:
        decord.logging.set_level(decord.logging.FATAL)
        super().__init__(path, "decord", limit)
        try:
            # Absolute, since FFmpeg takes the text before a colon, as in "10:30.mp4", for a protocol.
            self._reader = decord.VideoReader(str(path.absolute()), num_threads=1)
            length = len(self._reader)
            start_s = self._reader.get_frame_timestamp(range(length))[:, 0] if length else np.zeros(0)
        except (OSError, RuntimeError, decord.DECORDError) as error:
            raise VideoReadError(path, _reason(error)) from error
        self.num_frames = length
        self._require_same_times(start_s.astype(np.float64))

    def _require_same_times(self, start_s: NDArray[np.float64]) -> None:
        """Raise VideoReadError if decord's frames differ from those of the packets in number or time."""
        expected_s = self.times_s() if self._packets.pts else np.zeros(0)
        if len(start_s) != len(expected_s):
            raise VideoReadError(
                self._path,
                f"decord counts {len(start_s)} frames, its packets have times for {len(expected_s)}; {WAY_OUT}",
            )
        if (np.abs(start_s) > _UNKNOWN_TIME_S).all():
            return
        late_s = float(np.abs(start_s - start_s[0] - expected_s).max())
        if late_s > _TIME_TOLERANCE_S:
            raise VideoReadError(
                self._path, f"decord's times differ by up to {late_s:.3f} s from those of its packets; {WAY_OUT}"
            )

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames at the given indices."""
        self._require_few(indices)
        try:
            batch = self._reader.get_batch(list(indices))
        except (RuntimeError, decord.DECORDError) as error:
            raise VideoReadError(self._path, _reason(error)) from error
        # No copy, unlike asnumpy.
        frames: NDArray[np.uint8] = torch.utils.dlpack.from_dlpack(batch.to_dlpack()).numpy()
        return self._upright(frames)


def _reason(error: Exception) -> str:
    """Return decord's own reason; known reasons get an explanation and a way out."""
    text = first_line(error)
    if "cannot find video stream" in text:
        return f"{text} (no video that decord can decode); {WAY_OUT}"
    if "Failed to measure duration" in text:
        return f"decord finds no duration in the file; {WAY_OUT}"
    if "size must exactly match" in str(error):
        return f"decord cannot return frames of this width; {WAY_OUT} ({text})"
    return text
