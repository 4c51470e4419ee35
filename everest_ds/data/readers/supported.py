"""Which files decord and torchcodec are known to read rightly; they are asked for the frames of no others.

Both find a frame by seeking, and what they then give may be another frame, without an error. Whether it is depends
on the container, the codec, and how frames refer to each other. tests/unit/test_reader_oracle.py tries each kind
that is listed in `PROVEN` against decoding in one go, and that all others are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everest_ds.data.readers.base import WAY_OUT, VideoReadError
from everest_ds.data.readers.orientation import Turn, turn_of
from everest_ds.data.readers.packets import FAULTS, Packets, open_stream, read_index, reason_of, scan
from everest_ds.data.readers.quirks import Oddity


@dataclass(frozen=True, kw_only=True)
class Proven:
    """Kinds of files that a reader reads rightly.

    Attributes:
        codecs: FFmpeg's names of the codecs, by the first name of the container's format.
        oddities: What is allowed besides in files of H.264, HEVC, VP9 and AV1, by container.
        turns_in: Containers in which the reader turns pictures by the angle of their display matrix; mirrored
            pictures are turned by `everest_ds.data.readers.orientation` in any case.
    """

    codecs: Mapping[str, frozenset[str]]
    oddities: Mapping[str, frozenset[Oddity]] = field(default_factory=dict)
    turns_in: frozenset[str]


_COMMON = frozenset({"h264", "hevc", "vp9", "mpeg4", "mjpeg", "prores"})
_AVI = frozenset({"mpeg4", "mjpeg", "msmpeg4v2", "msmpeg4v3", "ffv1", "huffyuv"})
_MANY_FRAMES = frozenset({"h264", "hevc", "vp9", "av1"})
_REFERS_FAR = frozenset({Oddity.OPEN_GOP})

PROVEN = {
    "decord": Proven(
        codecs={
            "mov": _COMMON,
            "matroska": _COMMON | {"vp8", "ffv1"},
            "avi": _AVI,
            "flv": frozenset({"h264", "flv1"}),
        },
        turns_in=frozenset({"mov"}),
    ),
    "torchcodec": Proven(
        codecs={
            "mov": _COMMON | {"av1"},
            "matroska": _COMMON | {"av1", "vp8", "ffv1"},
            "avi": _AVI,
            "flv": frozenset({"h264", "flv1"}),
        },
        oddities={"mov": _REFERS_FAR | {Oddity.HIDDEN}, "matroska": _REFERS_FAR},
        turns_in=frozenset({"mov", "matroska"}),
    ),
}
"""What each reader is known to read rightly, by the reader's name. PyAV reads all files."""


def examine(path: Path, reader: str) -> tuple[Packets, Turn]:
    """Look at a file that one of the readers in `PROVEN` is to read.

    Returns:
        What its packets say, and how its pictures are to be turned.

    Raises:
        VideoReadError: It cannot be opened, or the reader is not known to read such files rightly.
    """
    try:
        container, stream = open_stream(path)
        with container:
            packets = read_index(container, stream) or scan(container, stream, hold=False)
            fault = _fault_of(packets, PROVEN[reader])
            if fault is not None:
                raise VideoReadError(path, f"{reader} may give wrong frames of it: {fault}; {WAY_OUT}")
            container.seek(packets.keys[0].place, stream=stream)
            frame: Any = next(container.decode(stream))
            turn = turn_of(frame)
            is_interlaced = frame.interlaced_frame
    except StopIteration as error:
        raise VideoReadError(path, "none of its frames can be decoded") from error
    except FAULTS as error:
        raise VideoReadError(path, reason_of(error)) from error
    if is_interlaced:
        raise VideoReadError(path, f"{reader} may give wrong colours of it: {Oddity.INTERLACED}; {WAY_OUT}")
    return packets, turn


def _fault_of(packets: Packets, proven: Proven) -> str | None:
    """Return why the packets are of no kind that a reader is known to read rightly."""
    allowed = proven.oddities.get(packets.container, frozenset()) if packets.codec in _MANY_FRAMES else frozenset()
    odd = sorted(packets.oddities - allowed, key=list(Oddity).index)
    if odd:
        return str(odd[0])
    if packets.codec not in proven.codecs.get(packets.container, ()):
        return f"{packets.codec} in {packets.container} did not pass the tests, or is not in them"
    return None if packets.pts is not None else str(Oddity.NO_TIMES)
