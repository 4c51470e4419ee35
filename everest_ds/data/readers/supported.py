"""Which files decord and torchcodec are known to read correctly; other files are refused.

Both find a frame by seeking, and may return a wrong frame without an error. Whether they do depends on the
container, the codec, and how frames refer to each other. The reader oracle in tests/unit/data/readers compares each
kind in `SUPPORTED` with decoding the whole file, and checks that all others are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everest_ds.data.readers.base import WAY_OUT, PixelLimit, VideoReadError
from everest_ds.data.readers.orientation import Orientation, orientation_of
from everest_ds.data.readers.packets import FAULTS, Packets, open_stream, read_packets, reason_of
from everest_ds.data.readers.quirks import Quirk


@dataclass(frozen=True, kw_only=True)
class Supported:
    """Kinds of files that a reader reads correctly.

    Attributes:
        codecs: FFmpeg's names of the codecs, by the first of its names of the container's format.
        quirks: Quirks that are allowed in H.264, HEVC, VP9 and AV1 files, by container.
        rotates_in: Containers in which the reader applies the rotation of a display matrix; mirroring is always
            done by `everest_ds.data.readers.orientation`.
    """

    codecs: Mapping[str, frozenset[str]]
    quirks: Mapping[str, frozenset[Quirk]] = field(default_factory=dict)
    rotates_in: frozenset[str]


_COMMON = frozenset({"h264", "hevc", "vp9", "mpeg4", "mjpeg", "prores"})
_AVI = frozenset({"mpeg4", "mjpeg", "msmpeg4v2", "msmpeg4v3", "ffv1", "huffyuv"})
_MANY_FRAMES = frozenset({"h264", "hevc", "vp9", "av1"})
_REFERS_FAR = frozenset({Quirk.OPEN_GOP})

SUPPORTED = {
    "decord": Supported(
        codecs={
            "mov": _COMMON,
            "matroska": _COMMON | {"vp8", "ffv1"},
            "avi": _AVI,
            "flv": frozenset({"h264", "flv1"}),
        },
        rotates_in=frozenset({"mov"}),
    ),
    "torchcodec": Supported(
        codecs={
            "mov": _COMMON | {"av1"},
            "matroska": _COMMON | {"av1", "vp8", "ffv1"},
            "avi": _AVI,
            "flv": frozenset({"h264", "flv1"}),
        },
        quirks={"mov": _REFERS_FAR | {Quirk.HIDDEN}, "matroska": _REFERS_FAR},
        rotates_in=frozenset({"mov", "matroska"}),
    ),
}
"""Files that each reader is known to read correctly, by the reader's name. PyAV reads all files."""


class SupportedFile:
    """Base class of the decord and torchcodec readers: inspects a file before they open it.

    Args:
        path: The video.
        reader: Name of the reader.
        limit: Limit on the pixels decoded at a time.

    Raises:
        VideoReadError: The file cannot be opened, or the reader is not known to read such files correctly.
    """

    num_frames: int

    def __init__(self, path: Path, reader: str, limit: PixelLimit) -> None:
        self._path, self._limit = path, limit
        self._packets, self._orientation, self._size = _examine(path, reader, limit)
        rotates = self._packets.container in SUPPORTED[reader].rotates_in
        self._rotation = self._orientation.rotation if rotates else 0

    def times_s(self) -> NDArray[np.float64]:
        """Return the start of each frame in seconds from the first one, from the file's packets."""
        return self._packets.times_s(self.num_frames)

    def _require_few(self, indices: Sequence[int]) -> None:
        """Raise VideoReadError if these frames have more pixels than the limit allows."""
        self._limit.require(self._path, len(indices), *self._size)

    def _upright(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Rotate and mirror frames as far as the reader has not done it."""
        return self._orientation.complete(frames, self._rotation)


def _examine(path: Path, reader: str, limit: PixelLimit) -> tuple[Packets, Orientation, tuple[int, int]]:
    """Return the facts from a file's packets, the orientation of its frames, and their width and height.

    Raises:
        VideoReadError: The file cannot be opened, or the reader is not known to read such files correctly.
    """
    try:
        container, stream = open_stream(path, limit)
        with container:
            packets = read_packets(container, stream)
            fault = _fault_of(packets, SUPPORTED[reader])
            if fault is not None:
                raise VideoReadError(path, f"{reader} may return wrong frames: {fault}; {WAY_OUT}")
            container.seek(packets.keys[0].seek_to, stream=stream)
            frame: Any = next(container.decode(stream))
            orientation = orientation_of(frame)
            is_interlaced = frame.interlaced_frame
    except StopIteration as error:
        raise VideoReadError(path, "none of its frames can be decoded") from error
    except FAULTS as error:
        raise VideoReadError(path, reason_of(error)) from error
    if is_interlaced:
        raise VideoReadError(path, f"{reader} may return wrong colours: {Quirk.INTERLACED}; {WAY_OUT}")
    return packets, orientation, (frame.width, frame.height)


def _fault_of(packets: Packets, supported: Supported) -> str | None:
    """Return why a reader is not known to read such packets correctly; None if it is."""
    allowed = supported.quirks.get(packets.container, frozenset()) if packets.codec in _MANY_FRAMES else frozenset()
    odd = sorted(packets.quirks - allowed, key=list(Quirk).index)
    if odd:
        return str(odd[0])
    if packets.codec not in supported.codecs.get(packets.container, ()):
        return f"{packets.codec} in {packets.container} failed the tests, or is not tested"
    return None if packets.pts is not None else str(Quirk.NO_TIMES)
