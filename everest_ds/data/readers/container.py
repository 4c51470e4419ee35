"""Comparison of a video file's header with its packets, without decoding: was the file cut off?

Place in the flow: path -> `read_container` -> Container -> `describe_missing`.

A header gives the length of the whole file, which is that of its longest stream: sound, subtitles, a timecode track
or a second video stream may be longer than the video stream that is read. If the header gives the length of the
video stream, its packets must reach that length; otherwise the packets of any stream must reach the file's length.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A file counts as cut off if its header announces more than this beyond the last packet: the larger of a share of
# the length and a number of seconds.
_MISSING_SHARE, _MISSING_S = 0.1, 0.5
# Containers without a length in the header: FFmpeg estimates it from the file's last packets.
_NO_LENGTHS = {"mpegts", "mpeg"}


@dataclass(frozen=True, kw_only=True)
class Container:
    """What a file's header announces, and what its packets contain.

    Attributes:
        packets: Packets of the video stream that is read.
        declared: Its number of frames by the header; 0 if the header has none.
        declared_s: Its length in seconds by the header; None if the header has none.
        end_s: End of its last packet, in seconds from the start of its first one.
        starts_with_key: Whether its first packet is a keyframe.
        hidden: Its packets that an edit list hides: those that start before zero.
        file_s: Length in seconds of the longest stream by the header; None if the header has none.
        file_end_s: End of the last packet of any stream, in seconds. Other streams than the video are read only if
            ``declared_s`` is None and the video is shorter than ``file_s``.
    """

    packets: int
    declared: int
    declared_s: float | None
    end_s: float
    starts_with_key: bool
    hidden: int
    file_s: float | None
    file_end_s: float


def describe_missing(container: Container) -> str | None:
    """Return in words what the header announces and the file lacks; None if nothing is missing."""
    if container.declared_s is not None:
        if _is_short(container.declared_s, container.end_s):
            return (
                f"its header announces {container.declared_s:.1f} s of video, its last frame ends at "
                f"{container.end_s:.1f} s"
            )
        return None
    if container.declared - container.packets > _MISSING_SHARE * container.declared:
        return f"its header announces {container.declared} frames, it contains {container.packets}"
    if container.file_s is not None and _is_short(container.file_s, container.file_end_s):
        return (
            f"its header announces {container.file_s:.1f} s, the last packet of any stream ends at "
            f"{container.file_end_s:.1f} s"
        )
    return None


def read_container(path: Path) -> Container | None:
    """Read a file's header and packets with PyAV, without decoding; None if they cannot be read."""
    import av

    from everest_ds.data.readers.packets import FAULTS, open_container

    try:
        with open_container(path) as file:
            stream = file.streams.best("video")
            if stream is None:
                return None
            packets = [_Packet.of(packet) for packet in _filled(file.demux(stream))]
            kinds = set(file.format.name.split(","))
            file_s = None if kinds & _NO_LENGTHS or file.duration is None else file.duration / av.time_base
            declared_s = _picture_length_s(stream, kinds, file_s)
            declared = stream.frames
    except FAULTS:
        return None
    timed = [packet for packet in packets if not math.isnan(packet.start_s)]
    if not timed:
        return None
    first_s, last_s = min(packet.start_s for packet in timed), max(packet.end_s for packet in timed)
    end_s = last_s - max(first_s, 0.0)
    if "matroska" in kinds:  # its lengths count from zero, even if a stream starts later
        end_s = max(end_s, last_s)
    file_end_s = max(end_s, last_s)
    if declared_s is None and file_s is not None and _is_short(file_s, file_end_s):
        file_end_s = max(file_end_s, _last_end_s(path))
    return Container(
        packets=len(packets),
        declared=declared,
        declared_s=declared_s,
        end_s=end_s,
        starts_with_key=timed[0].is_key,
        hidden=sum(packet.start_s < -1e-6 for packet in timed),
        file_s=file_s,
        file_end_s=file_end_s,
    )


def _is_short(announced_s: float, found_s: float) -> bool:
    return announced_s - found_s > max(_MISSING_SHARE * announced_s, _MISSING_S)


@dataclass(frozen=True)
class _Packet:
    """Start and end of a packet in seconds; NaN if it has no time."""

    start_s: float
    end_s: float
    is_key: bool

    @classmethod
    def of(cls, packet: Any) -> "_Packet":
        """Read the times of a PyAV packet; the decoding time is used if there is no presentation time."""
        time = packet.dts if packet.pts is None else packet.pts
        if time is None or packet.time_base is None:
            return cls(math.nan, math.nan, packet.is_keyframe)
        start_s = float(time * packet.time_base)
        return cls(start_s, start_s + float((packet.duration or 0) * packet.time_base), packet.is_keyframe)


def _filled(packets: Iterable[Any]) -> Iterator[Any]:
    """Yield the packets without the empty ones that end a stream."""
    return (packet for packet in packets if packet.size)


def _picture_length_s(stream: Any, kinds: set[str], file_s: float | None) -> float | None:
    """Return the length in seconds of the video stream by the header; None if the header has none."""
    if "mov" in kinds and stream.duration and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if "avi" in kinds and stream.frames and stream.average_rate:
        # For a file without its index, FFmpeg shortens the length to the packets present; the frame count stays.
        return float(stream.frames / stream.average_rate)
    if "matroska" in kinds:
        for name, value in stream.metadata.items():
            if name.upper().split("-")[0] == "DURATION":
                length_s = _parse_length_s(value)
                if length_s is not None:  # the tag may be a leftover of a longer file
                    return length_s if file_s is None else min(length_s, file_s)
    return None


def _parse_length_s(text: str) -> float | None:
    """Return the seconds of a Matroska tag, ``HH:MM:SS.NANOSECONDS``; None if it has another form."""
    try:
        hours, minutes, seconds = text.strip().split(":")
        length_s = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None
    return length_s if math.isfinite(length_s) and length_s > 0 else None


def _last_end_s(path: Path) -> float:
    """Return the end of the last packet of any stream, in seconds; reading stops at the first fault."""
    from everest_ds.data.readers.packets import FAULTS, open_container

    last_s = 0.0
    with contextlib.suppress(*FAULTS), open_container(path) as file:
        for packet in _filled(file.demux()):
            end_s = _Packet.of(packet).end_s
            if end_s > last_s:  # False for NaN
                last_s = end_s
    return last_s
