"""Facts about a video from its packets, without decoding them, and which packets must be decoded for a frame.

Place in the flow: file -> packets -> times of its frames, and the spans of packets that `readers.pyav` decodes.
"""

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from everest_ds.data.readers.base import NO_MEMORY, PixelLimit, VideoReadError, even_times_s, first_line
from everest_ds.data.readers.bitstream import Inspector
from everest_ds.data.readers.quirks import Quirk, field_quirks, has_trusted_times, order_quirks, time_quirks

FAULTS = (av.FFmpegError, OSError, ValueError, MemoryError)
"""Exceptions that PyAV raises for a file that it cannot read."""

# PyAV before 19 needs this option for metadata that is not UTF-8. PyAV 19 does not, and lacks the option.
_OPEN_OPTIONS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# Packets of files up to this size are kept from the scan, so that reading frames needs no second read and no seek.
_HELD_BYTES = 32 << 20
_LIMIT = PixelLimit()
# Largest number of packets: 37 hours at 30 frames a second. The facts kept of each take up to 400 bytes.
_MOST_PACKETS = 4_000_000
# Packets kept for inspection in any case.
_HEAD_PACKETS = 64
# FFmpeg's field order of progressive video; 0 is unknown, larger values are interlaced.
_PROGRESSIVE = 1


class Key(NamedTuple):
    """A keyframe: its presentation time and seek target in ticks, and its packet's number in decoding order.

    Not a dataclass: building three hundred of those took a fifth of the time to open a file of keyframes.
    """

    pts: int
    seek_to: int
    position: int


@dataclass
class Span:
    """Packets decoded in one go, from a keyframe up to number ``stop``; ``targets`` maps pts to wanted index."""

    key: Key
    stop: int
    targets: dict[int, int]


@dataclass(frozen=True)
class Packets:
    """Facts about a video stream, from its packets.

    Attributes:
        pts: Times of the shown frames, ascending, in ticks; None if they cannot be trusted.
        keys: Keyframes at which decoding can start, ascending by time.
        positions: Time of a frame -> number of its packet in decoding order.
        held: The packets by number; None if they are too large to keep.
        ticks_per_s: Ticks of the stream's clock in a second.
        frames_per_s: Average frame rate of the stream.
        container: First of FFmpeg's names of the format.
        codec: FFmpeg's name of the codec.
        quirks: What makes frames hard to find by number.
    """

    pts: list[int] | None
    keys: list[Key]
    positions: dict[int | None, int]
    held: list[Any] | None
    ticks_per_s: float
    frames_per_s: float
    container: str = "mov"
    codec: str = "h264"
    quirks: frozenset[Quirk] = frozenset()

    def times_s(self, num_frames: int) -> NDArray[np.float64]:
        """Return the start of each frame in seconds from the first one; evenly spaced without trusted times."""
        if self.pts is None:
            return even_times_s(num_frames, self.frames_per_s)
        return (np.array(self.pts, dtype=np.float64) - self.pts[0]) / self.ticks_per_s

    def spans(self, indices: Sequence[int]) -> list[Span]:
        """Return the packets to decode for the frames at these indices, as ascending spans; needs trusted times.

        The span of a frame begins at the last keyframe shown no later than it. Spans without a gap between them are
        merged; even for a gap of a single packet a new start is faster (measured, 340x256: 0.1 ms against 0.45 ms
        for decoding it).
        """
        assert self.pts is not None
        key_pts = [key.pts for key in self.keys]
        spans: list[Span] = []
        for index in sorted(set(indices)):
            time = self.pts[index]
            key = self.keys[max(bisect_right(key_pts, time) - 1, 0)]
            stop = self.positions[time] + 1
            last = spans[-1] if spans else None
            if last is not None and key.position <= last.stop:
                last.key = min(last.key, key, key=lambda key: key.position)
                last.stop = max(last.stop, stop)
                last.targets[time] = index
            else:
                spans.append(Span(key, stop, {time: index}))
        return spans


def open_container(path: Path, limit: PixelLimit = _LIMIT) -> Any:
    """Open a file for reading, whatever characters its name has and however its metadata is encoded.

    FFmpeg decodes some frames here if the header is incomplete, but none that are larger than ``limit``.

    Raises:
        One of `FAULTS`: The file cannot be opened.
    """
    return av.open(f"file:{path}", options={"max_pixels": str(limit.of_frame)}, **_OPEN_OPTIONS)


def open_stream(path: Path, limit: PixelLimit = _LIMIT) -> tuple[Any, Any]:
    """Open a file and its best video stream, for decoding with one thread.

    Raises:
        VideoReadError: Its frames are larger than ``limit`` allows.
        ValueError: It has no video.
        One of `FAULTS`: The file cannot be opened.
    """
    container = open_container(path, limit)
    stream = container.streams.best("video")
    if stream is None:
        container.close()
        raise ValueError("it has no video stream")
    context = stream.codec_context
    if context is None:
        container.close()
        raise ValueError("FFmpeg cannot decode its codec")
    if not 0 < context.width * context.height <= limit.of_frame:
        container.close()
        limit.refuse_frame(path, context.width, context.height)
    context.thread_count = 1
    # Frames may be larger than the header says.
    context.options = {"max_pixels": str(limit.of_frame)}
    return container, stream


def read_packets(container: Any, stream: Any, *, hold: bool = False) -> Packets:
    """Read the facts about an open stream from its packets; ``hold`` keeps the packets if they are small enough."""
    return packets_from_header(container, stream) or scan(container, stream, hold=hold)


def packets_from_header(container: Any, stream: Any) -> Packets | None:
    """Return the result of `scan` from the index in a file's header, without reading the rest of the file.

    Only for MP4 and MOV with a codec of keyframes only (the index has decoding times, not presentation times), a
    complete index and no hidden frames. None for all others.
    """
    if "mov" not in container.format.name.split(",") or not stream.codec_context.codec.intra_only:
        return None
    if not 0 < len(stream.index_entries) <= _MOST_PACKETS:
        return None
    entries = list(stream.index_entries)
    if len(entries) != stream.frames:  # a fragmented file: the index covers only some fragments
        return None
    pts = [entry.timestamp for entry in entries]
    is_whole = max(entry.pos + entry.size for entry in entries) <= container.size
    is_plain = all(entry.is_keyframe and not entry.is_discard for entry in entries)
    if not is_whole or not is_plain or pts != sorted(set(pts)):
        return None
    first = next(container.demux(stream))
    container.seek(pts[0], stream=stream)
    if first.pts != pts[0]:  # presentation times differ from decoding times
        return None
    return Packets(
        pts=pts,
        keys=[Key(time, time, position) for position, time in enumerate(pts)],
        positions={time: position for position, time in enumerate(pts)},
        held=None,
        **_stream_facts(container, stream),
    )


def scan(container: Any, stream: Any, *, hold: bool) -> Packets:
    """Read all packets of an open stream, and inspect them."""
    # FFmpeg seeks by decoding time in mp4 and mov, by presentation time elsewhere.
    by_dts = "mov" in container.format.name.split(",")
    inspector = Inspector(stream.codec_context.codec.canonical_name, stream.codec_context.extradata)
    quirks = inspector.quirks
    times: list[int | None] = []
    hidden: set[int] = set()
    keys: list[Key] = []
    held: list[Any] = []
    max_held = sys.maxsize if hold and container.size <= _HELD_BYTES else _HEAD_PACKETS
    for packet in container.demux(stream):
        if not packet.size:
            continue
        time, position = packet.pts, len(times)
        if position == _MOST_PACKETS:
            raise ValueError(f"it has more than {_MOST_PACKETS} frames; cut it into parts")
        times.append(time)
        if position < max_held:
            held.append(packet)
        if packet.is_keyframe and time is not None and inspector.starts_clean(packet):
            keys.append(Key(time, packet.dts if by_dts and packet.dts is not None else time, position))
        if packet.is_discard:
            hidden.add(position)
        if packet.is_corrupt:
            quirks.add(Quirk.DAMAGED)
        if inspector.looks_at_all:
            inspector.look(packet)
    facts = _stream_facts(container, stream)
    kind, context = (facts["container"], facts["codec"]), stream.codec_context
    quirks |= time_quirks(times, hidden, [key.position for key in keys])
    quirks |= field_quirks(*kind, is_interlaced=context.field_order > _PROGRESSIVE)
    quirks |= order_quirks(
        *kind,
        times,
        has_b_frames=context.has_b_frames or Quirk.REFERS_AHEAD in quirks,
        refers_ahead=lambda: inspector.refers_ahead(held[:_HEAD_PACKETS]),
    )
    trusted = has_trusted_times(*kind, is_intra_only=context.codec.intra_only, quirks=quirks)
    shown = [time for position, time in enumerate(times) if time is not None and position not in hidden]
    return Packets(
        pts=sorted(shown) if trusted and shown else None,
        keys=sorted(keys, key=lambda key: key.pts),
        positions={time: position for position, time in enumerate(times)},
        held=held if trusted and max_held > _HEAD_PACKETS else None,
        quirks=frozenset(quirks),
        **facts,
    )


def _stream_facts(container: Any, stream: Any) -> dict[str, Any]:
    return {
        "ticks_per_s": float(1 / stream.time_base),
        "frames_per_s": float(stream.average_rate or 25),
        "container": str(container.format.name).split(",", maxsplit=1)[0],
        "codec": stream.codec_context.codec.canonical_name,
    }


def scan_packets(path: Path, limit: PixelLimit = _LIMIT) -> Packets:
    """Read the facts about a file's video from its packets.

    Raises:
        VideoReadError: The file cannot be opened, or has no video.
    """
    try:
        container, stream = open_stream(path, limit)
        with container:
            return read_packets(container, stream)
    except FAULTS as error:
        raise VideoReadError(path, reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """Return FFmpeg's own message, without its error number and the path."""
    if isinstance(error, MemoryError):
        return NO_MEMORY
    if isinstance(error, av.FFmpegError) and error.strerror:
        step = " (in decoding)" if error.filename == "avcodec_send_packet()" else ""
        return f"{error.strerror}{step}"
    return first_line(error)
