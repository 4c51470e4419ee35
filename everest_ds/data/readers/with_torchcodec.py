"""Reading videos with torchcodec, that is with the FFmpeg libraries of the machine.

torchcodec leaves hidden frames out and applies a file's rotation itself. It gives no times without decoding; those
are taken from the packets, as PyAV reads them. It numbers frames by their times, so those of AVI files with
B-frames, which carry no times of showing, would come out in the wrong places (about half of them): these files are
refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torchcodec.decoders import VideoDecoder

from everest_ds.data.readers.base import VideoReadError, first_line

if TYPE_CHECKING:
    from everest_ds.data.readers.packets import Packets

_FAULTS = (RuntimeError, ValueError, IndexError, OSError)


class TorchcodecReader:
    """An open video; see `everest_ds.data.readers.base.Reader`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # Absolute, since FFmpeg takes the text before a colon, as in "10:30.mp4", for a protocol.
            name = str(path.absolute())
            self._decoder = VideoDecoder(name, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
            self.num_frames = len(self._decoder)
        except _FAULTS as error:
            raise VideoReadError(path, _reason(error)) from error
        if self.num_frames == 0:
            raise VideoReadError(path, "none of its frames can be shown")
        if _is_avi(path) and self._scan().pts is None:
            raise VideoReadError(
                path,
                "torchcodec misplaces frames of AVI files with B-frames; data.reader=decord or pyav reads them",
            )

    def times_s(self) -> NDArray[np.float64]:
        """Return when each frame starts."""
        packets = self._scan()
        if packets.pts is not None and len(packets.pts) != self.num_frames:
            raise VideoReadError(
                self._path,
                f"torchcodec counts {self.num_frames} frames, its packets have times for {len(packets.pts)}",
            )
        return packets.times_s(self.num_frames)

    def _scan(self) -> "Packets":
        from everest_ds.data.readers.packets import scan_packets

        return scan_packets(self._path)

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames at the given indices."""
        try:
            frames: NDArray[np.uint8] = self._decoder.get_frames_at(list(indices)).data.numpy()
        except _FAULTS as error:
            raise VideoReadError(self._path, _reason(error)) from error
        return frames


def _reason(error: Exception) -> str:
    text = first_line(error)
    return "it has no video stream" if "best video stream is unknown" in text else text


def _is_avi(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(12)
    return start[:4] == b"RIFF" and start[8:] == b"AVI "
