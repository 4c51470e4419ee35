"""Reading videos with torchcodec, which uses the FFmpeg libraries of the machine.

torchcodec leaves out hidden frames and applies the rotation of a display matrix; mirroring is done here. It returns
times only with decoded frames, so times are read from the packets with PyAV. If packets have decoding times only,
or seeks are inexact (transport streams), it returns wrong frames without an error: `supported` lists the kinds of
files that it reads correctly, and all others are refused.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torchcodec.decoders import VideoDecoder

from everest_ds.data.readers.base import WAY_OUT, PixelLimit, VideoReadError, first_line
from everest_ds.data.readers.supported import SupportedFile

_FAULTS = (RuntimeError, ValueError, IndexError, OSError)


class TorchcodecReader(SupportedFile):
    """An open video; see `everest_ds.data.readers.base.Reader`."""

    def __init__(self, path: Path, limit: PixelLimit) -> None:
        super().__init__(path, "torchcodec", limit)
        try:
            # Absolute, since FFmpeg takes the text before a colon, as in "10:30.mp4", for a protocol.
            name = str(path.absolute())
            self._decoder = VideoDecoder(name, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
            self.num_frames = len(self._decoder)
        except _FAULTS as error:
            raise VideoReadError(path, _reason(error)) from error
        expected = len(self._packets.pts or ())
        if self.num_frames != expected:
            raise VideoReadError(
                path,
                f"torchcodec counts {self.num_frames} frames, its packets have times for {expected}; {WAY_OUT}",
            )

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames at the given indices."""
        self._require_few(indices)
        try:
            frames: NDArray[np.uint8] = self._decoder.get_frames_at(list(indices)).data.numpy()
        except _FAULTS as error:
            raise VideoReadError(self._path, _reason(error)) from error
        return self._upright(frames)


def _reason(error: Exception) -> str:
    text = first_line(error)
    return "it has no video stream" if "best video stream is unknown" in text else text
