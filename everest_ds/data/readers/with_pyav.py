"""Reading videos with PyAV, that is with the FFmpeg in its wheel.

Opening reads all packets, without decoding them, to learn the times of the frames that can be shown. A frame is
then found by seeking to the keyframe before it and decoding up to its time. Where a container has no times that can
be trusted (AVI with B-frames carries the order of decoding only), frames are counted instead: the video is decoded
once at opening and again, from its beginning, in reading.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from everest_ds.data.readers.base import VideoReadError, even_times_s, first_line

_FAULTS = (av.FFmpegError, OSError, ValueError)


@dataclass(frozen=True)
class Packets:
    """What the packets of a video stream say, without any of them being decoded.

    Attributes:
        pts: Times of the frames that can be shown, ascending, in the stream's ticks; None where they cannot be
            trusted.
        keys: Keyframes, ascending: (time at which it is shown, place to seek to), in ticks.
        ticks_per_s: Ticks of a second.
        frames_per_s: The stream's average rate.
    """

    pts: list[int] | None
    keys: list[tuple[int, int]]
    ticks_per_s: float
    frames_per_s: float

    def times_s(self, num_frames: int) -> NDArray[np.float64]:
        """Return when each frame starts, seconds from the first one; evenly spaced without trusted times."""
        if self.pts is None:
            return even_times_s(num_frames, self.frames_per_s)
        return (np.array(self.pts, dtype=np.float64) - self.pts[0]) / self.ticks_per_s


class PyavReader:
    """An open video; see `everest_ds.data.readers.base.Reader`.

    Frames that change their size on the way are an error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size: tuple[int, int] | None = None
        try:
            self._container, self._stream = _open(path)
            self._packets = _scan(self._container, self._stream)
            if self._packets.pts is None:
                self._rewind()
                self.num_frames = sum(1 for _ in self._decode())
            else:
                self.num_frames = len(self._packets.pts)
        except _FAULTS as error:
            raise VideoReadError(path, _reason(error)) from error
        if self.num_frames == 0:
            raise VideoReadError(path, "none of its frames can be shown")

    def times_s(self) -> NDArray[np.float64]:
        """Return when each frame starts."""
        return self._packets.times_s(self.num_frames)

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the frames at the given indices."""
        wanted = sorted(set(indices))
        pts = self._packets.pts
        try:
            frames = self._count_to(wanted) if pts is None else self._seek_to(wanted, pts)
        except _FAULTS as error:
            raise VideoReadError(self._path, _reason(error)) from error
        missing = [index for index in wanted if index not in frames]
        if missing:
            raise VideoReadError(self._path, f"frame {missing[0]} of {self.num_frames} cannot be decoded")
        return np.stack([frames[index] for index in indices])

    def _count_to(self, wanted: list[int]) -> dict[int, NDArray[np.uint8]]:
        """Decode from the beginning, and keep the frames wanted."""
        self._rewind()
        frames: dict[int, NDArray[np.uint8]] = {}
        remaining = set(wanted)
        for index, frame in enumerate(self._decode()):
            if index in remaining:
                frames[index] = _pixels(frame)
            if index >= wanted[-1]:
                break
        return frames

    def _seek_to(self, wanted: list[int], pts: list[int]) -> dict[int, NDArray[np.uint8]]:
        """Decode from the keyframe before each frame wanted, once for frames that share one."""
        key_pts = [key[0] for key in self._packets.keys]
        groups: dict[int, dict[int, int]] = {}
        for index in wanted:
            key = max(bisect_right(key_pts, pts[index]) - 1, 0)
            groups.setdefault(key, {})[pts[index]] = index
        frames: dict[int, NDArray[np.uint8]] = {}
        for key, targets in groups.items():
            self._container.seek(self._packets.keys[key][1], stream=self._stream)
            found = dict(self._matches(targets))
            if len(found) < len(targets):  # a seek may come out too late; the beginning never does
                self._rewind()
                found = dict(self._matches(targets))
            frames |= found
        return frames

    def _matches(self, targets: dict[int, int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Decode on until the last of the targets (time -> index) has passed; yield those met."""
        last = max(targets)
        for frame in self._decode():
            if frame.pts in targets:
                yield targets[frame.pts], _pixels(frame)
            if frame.pts is not None and frame.pts >= last:
                return

    def _decode(self) -> Iterator[Any]:
        """Decode from where the container is, as long as the size stays."""
        for frame in self._container.decode(self._stream):
            size = (frame.width, frame.height)
            self._size = self._size or size
            if size != self._size:
                begun = "{}x{}".format(*self._size)
                raise ValueError(f"its frames change from {begun} to {size[0]}x{size[1]} pixels")
            yield frame

    def _rewind(self) -> None:
        """Open the file again: not every container can seek to its beginning."""
        self._container.close()
        self._container, self._stream = _open(self._path)


def scan_packets(path: Path) -> Packets:
    """Read all packets of a video.

    Raises:
        VideoReadError: The file cannot be opened, or has no video.
    """
    try:
        container, stream = _open(path)
        with container:
            return _scan(container, stream)
    except _FAULTS as error:
        raise VideoReadError(path, _reason(error)) from error


def _open(path: Path) -> tuple[Any, Any]:
    """Open the file and its best video stream, to be decoded by one thread."""
    container = av.open(f"file:{path}", metadata_errors="replace")
    stream = container.streams.best("video")
    if stream is None:
        container.close()
        raise ValueError("it has no video stream")
    stream.codec_context.thread_count = 1
    return container, stream


def _scan(container: Any, stream: Any) -> Packets:
    # FFmpeg seeks in mp4 and mov by the time of decoding, elsewhere by that of showing.
    by_dts = "mov" in container.format.name.split(",")
    shown: list[int | None] = []
    keys: list[tuple[int, int]] = []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_keyframe and packet.pts is not None:
            keys.append((packet.pts, packet.dts if by_dts and packet.dts is not None else packet.pts))
        if keys and not packet.is_discard:  # nothing can be decoded before the first keyframe
            shown.append(packet.pts)
    first_key = min(keys)[0] if keys else 0
    pts = sorted(value for value in shown if value is not None and value >= first_key)
    counted = container.format.name == "avi" and stream.codec_context.has_b_frames
    trusted = bool(pts) and None not in shown and len(set(pts)) == len(pts) and not counted
    return Packets(
        pts=pts if trusted else None,
        keys=sorted(keys),
        ticks_per_s=float(1 / stream.time_base),
        frames_per_s=float(stream.average_rate or 25),
    )


def _pixels(frame: Any) -> NDArray[np.uint8]:
    """Return a decoded frame as RGB, turned as the file asks for."""
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(frame.rotation / 90))


def _reason(error: Exception) -> str:
    """Return FFmpeg's own words, without its number and without the path."""
    if isinstance(error, av.FFmpegError) and error.strerror:
        step = " (in decoding)" if error.filename == "avcodec_send_packet()" else ""
        return f"{error.strerror}{step}"
    return first_line(error)
