"""What the header of a video file announces, and what the file holds: read without decoding.

Place in the flow: path -> `read_container` -> Container -> `describe_missing`: was the file cut off?

A header gives the length of the whole file, which is that of its longest stream: sound, subtitles, a timecode track
or a second picture may be longer than the picture that is read. So like is compared with like. Where the picture
stream announces its own length, its packets must reach that; else the packets of some stream must reach the file's.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A header that announces more than this beyond the last packet is that of a file that was cut off: a share of its
# length, and seconds.
_MISSING_SHARE, _MISSING_S = 0.1, 0.5
# Containers without any length in the header: FFmpeg estimates it from the file's last packets.
_NO_LENGTHS = {"mpegts", "mpeg"}


@dataclass(frozen=True, kw_only=True)
class Container:
    """What a file says of itself, and what is in it.

    Attributes:
        packets: Packets of the picture stream, the one that is read.
        declared: Its frames that the header announces; 0 where it does not say.
        declared_s: Its length in seconds that the header announces; None where it does not say.
        end_s: Where its last packet ends, in seconds from its first one's start.
        starts_with_key: Whether its first packet is a key frame.
        hidden: Its packets that an edit list hides, those that start before zero.
        file_s: Length in seconds that the header announces for the longest stream; None where it does not say.
        file_end_s: Where the last packet of any stream ends, in seconds. Other streams than the picture are read
            only where ``declared_s`` is None and the picture is shorter than ``file_s``.
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
    """Return in words what a file announces and does not hold; None where it holds all of it."""
    if container.declared_s is not None:
        if _is_short(container.declared_s, container.end_s):
            return (
                f"its header announces {container.declared_s:.1f} s of picture, its last frame ends at "
                f"{container.end_s:.1f} s"
            )
        return None
    if container.declared - container.packets > _MISSING_SHARE * container.declared:
        return f"its header announces {container.declared} frames, it holds {container.packets}"
    if container.file_s is not None and _is_short(container.file_s, container.file_end_s):
        return (
            f"its header announces {container.file_s:.1f} s, the last packet of any stream ends at "
            f"{container.file_end_s:.1f} s"
        )
    return None


def read_container(path: Path) -> Container | None:
    """Read a file's headers and packets with PyAV, decoding nothing; None where it cannot."""
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
    if "matroska" in kinds:  # lengths count from zero there, wherever a stream starts
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
    """Where a packet starts and ends, in seconds; NaN where it has no time."""

    start_s: float
    end_s: float
    is_key: bool

    @classmethod
    def of(cls, packet: Any) -> "_Packet":
        """Read the times of PyAV's packet; the decoding time where it has no other."""
        time = packet.dts if packet.pts is None else packet.pts
        if time is None or packet.time_base is None:
            return cls(math.nan, math.nan, packet.is_keyframe)
        start_s = float(time * packet.time_base)
        return cls(start_s, start_s + float((packet.duration or 0) * packet.time_base), packet.is_keyframe)


def _filled(packets: Iterable[Any]) -> Iterator[Any]:
    """Leave out the empty packets that end a stream."""
    return (packet for packet in packets if packet.size)


def _picture_length_s(stream: Any, kinds: set[str], file_s: float | None) -> float | None:
    """Return the length that the header announces for the picture stream alone; None where it announces none."""
    if "mov" in kinds and stream.duration and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if "avi" in kinds and stream.frames and stream.average_rate:
        # FFmpeg shortens the length of a file without its index to what is there; the number of frames stays.
        return float(stream.frames / stream.average_rate)
    if "matroska" in kinds:
        for name, value in stream.metadata.items():
            if name.upper().split("-")[0] == "DURATION":
                length_s = _parse_length_s(value)
                if length_s is not None:  # a tag may be left over from a longer file
                    return length_s if file_s is None else min(length_s, file_s)
    return None


def _parse_length_s(text: str) -> float | None:
    """Return the seconds of a Matroska tag, ``HH:MM:SS.NANOSECONDS``; None where it is something else."""
    try:
        hours, minutes, seconds = text.strip().split(":")
        length_s = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None
    return length_s if math.isfinite(length_s) and length_s > 0 else None


def _last_end_s(path: Path) -> float:
    """Return where the last packet of any stream ends, in seconds; what follows a fault is not looked at."""
    from everest_ds.data.readers.packets import FAULTS, open_container

    last_s = 0.0
    with contextlib.suppress(*FAULTS), open_container(path) as file:
        for packet in _filled(file.demux()):
            end_s = _Packet.of(packet).end_s
            if end_s > last_s:  # never of NaN
                last_s = end_s
    return last_s
