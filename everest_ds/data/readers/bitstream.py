"""Inspection of the first bytes of packets: facts about their frames without decoding them.

Place in the flow: `packets.scan` passes the packets of a stream to an `Inspector`, in decoding order. A container
marks keyframes, but does not say whether decoding can start there; and some packets show no frame.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from everest_ds.data.readers.quirks import Quirk

# Types of NAL units in H.264 and HEVC.
_H264_SLICE, _H264_IDR, _H264_SEI, _H264_SPS, _H264_B_TYPE = 1, 5, 6, 7, 1
_HEVC_IRAP, _HEVC_BLA, _HEVC_NO_SLICE, _HEVC_SPS, _HEVC_SEI = range(16, 24), range(16, 19), 32, 33, 39
_RECOVERY_POINT, _DISPLAY_ORIENTATION = 6, 47
# Bytes of a unit that are inspected.
_HEAD_BYTES = 4096
# MPEG-4 packets without a coded frame are 6 or 7 bytes long; coded frames are longer.
_MPEG4_EMPTY_BYTES = 8
_MPEG4_VOP = b"\0\0\1\xb6"
_MPEG4_B_TYPE = 2


class Inspector:
    """Collects the quirks of one stream's packets, given FFmpeg's codec name and the decoder's extra data.

    Attributes:
        quirks: The quirks found so far.
        looks_at_all: Whether `look` must be called for each packet; otherwise it does nothing.
    """

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        self.quirks: set[Quirk] = set()
        self._codec = codec
        self._extradata = extradata
        self._sizes: set[bytes] = set()
        self._reference_pts: int | None = None
        looks: dict[str, Callable[[Any], None]] = {
            "vp8": self._look_vp8, "vp9": self._look_vp9, "mpeg4": self._look_mpeg4,
        }  # fmt: skip
        starts: dict[str, Callable[[Any], bool]] = {"h264": self._starts_h264, "hevc": self._starts_hevc}
        self._look = looks.get(codec)
        self._starts = starts.get(codec)
        self.looks_at_all = self._look is not None

    def look(self, packet: Any) -> None:
        """Inspect a packet for quirks."""
        if self._look is not None:
            self._look(packet)

    def refers_ahead(self, packets: Iterable[Any]) -> bool:
        """Return whether any of these H.264 packets contains a B-frame; True (unknown) for other codecs."""
        if self._codec != "h264":
            return True
        for packet in packets:
            for unit in self._units(packet):
                if unit[0] & 31 in (_H264_SLICE, _H264_IDR):
                    if _h264_slice_type(unit[1:]) == _H264_B_TYPE:
                        return True
                    break
        return False

    def starts_clean(self, packet: Any) -> bool:
        """Return whether decoding can start at a packet that its container marks as a keyframe."""
        if self._starts is None or self._starts(packet):
            return True
        self.quirks.add(Quirk.UNCLEAN_KEYS)
        return False

    def _note_size(self, header: bytes) -> None:
        self._sizes.add(header)
        if len(self._sizes) > 1:
            self.quirks.add(Quirk.CHANGING)

    def _look_vp8(self, packet: Any) -> None:
        """First byte, from its lowest bit: not a keyframe (1), version (3), is shown (1); bytes 6 to 9: size."""
        head = bytes(memoryview(packet)[:10])
        if not head[0] >> 4 & 1:
            self.quirks.add(Quirk.INVISIBLE)
        if not head[0] & 1:
            self._note_size(head[6:])

    def _look_vp9(self, packet: Any) -> None:
        frames = list(_vp9_frames(packet))
        shown = [head for head in frames if _vp9_is_shown(head)]
        if len(shown) != 1:
            self.quirks.add(Quirk.INVISIBLE)
        for head in frames:
            # A keyframe of profile 0: one byte, the fixed sync code, then the size. Other profiles store the size
            # differently, but equal sizes still have equal bytes.
            if head[1:4] == b"\x49\x83\x42":
                self._note_size(head[4:9])

    def _look_mpeg4(self, packet: Any) -> None:
        data = bytes(packet)
        frames = data.count(_MPEG4_VOP)
        if frames != 1 or len(data) <= _MPEG4_EMPTY_BYTES:  # packed B-frames, and the empty packets after them
            self.quirks.add(Quirk.INVISIBLE)
        place = data.find(_MPEG4_VOP) + len(_MPEG4_VOP)
        if frames > 1 or (frames and place < len(data) and data[place] >> 6 == _MPEG4_B_TYPE):
            self.quirks.add(Quirk.REFERS_AHEAD)
            # A B-frame is shown before the reference frame decoded before it, so a later time is a decoding time.
            if None not in (packet.pts, self._reference_pts) and packet.pts > self._reference_pts:
                self.quirks.add(Quirk.DECODING_TIMES)
        else:
            self._reference_pts = packet.pts

    def _starts_h264(self, packet: Any) -> bool:
        """Return whether the packet is an IDR frame, or a recovery point with no frames to wait for."""
        recovers = False
        for unit in self._units(packet):
            number = unit[0] & 31
            if number in (_H264_SLICE, _H264_IDR):
                return recovers or number == _H264_IDR
            if number == _H264_SPS:
                self._note_size(unit)
            elif number == _H264_SEI:
                for kind, content in self._messages(unit[1:]):
                    # The number of frames until recovery, an exponential Golomb number: 0 is a single bit 1.
                    recovers |= kind == _RECOVERY_POINT and content[:1] >= b"\x80"
        return False

    def _starts_hevc(self, packet: Any) -> bool:
        """Return whether the packet is a random access frame; after a broken link, some frames are never shown."""
        for unit in self._units(packet):
            number = unit[0] >> 1 & 63
            if number < _HEVC_NO_SLICE:
                if number in _HEVC_BLA:
                    self.quirks.add(Quirk.INVISIBLE)
                return number in _HEVC_IRAP
            if number == _HEVC_SPS:
                self._note_size(unit)
            elif number == _HEVC_SEI:
                list(self._messages(unit[2:]))
        return False

    def _messages(self, unit: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield type and content of the SEI messages of a unit; note a message that rotates the picture."""
        rest = unit.replace(b"\0\0\3", b"\0\0")
        while len(rest) > 2:
            header = []
            for _ in range(2):  # a number is a run of bytes 255 and one other byte, added up
                size = len(rest) - len(rest.lstrip(b"\xff")) + 1
                header.append(sum(rest[:size]))
                rest = rest[size:]
            kind, length = header
            if kind == _DISPLAY_ORIENTATION:
                self.quirks.add(Quirk.TURNED_BY_FRAMES)
            yield kind, rest[:length]
            rest = rest[length:]

    def _units(self, packet: Any) -> Iterator[bytes]:
        """Yield the first bytes of each NAL unit of an H.264 or HEVC packet."""
        view = memoryview(packet)
        extra = self._extradata
        if extra and extra[0] == 1:  # each unit follows its length
            width = (extra[4 if self._codec == "h264" else 21] & 3) + 1
            yield from _units_by_length(view, width)
        else:  # each unit follows the bytes 0, 0, 1
            yield from _units_by_mark(view)


def _h264_slice_type(header: bytes) -> int:
    """Return 0 for P, 1 for B, 2 for I: the second exponential Golomb number of a slice; -1 if it is cut off."""
    bits = "".join(f"{byte:08b}" for byte in header[:8])
    start = number = 0
    for _ in range(2):
        zeros = bits.find("1", start) - start
        if zeros < 0:
            return -1
        number = int(bits[start + zeros : start + 2 * zeros + 1], 2) - 1
        start += 2 * zeros + 1
    return number % 5


def _units_by_length(view: memoryview, width: int) -> Iterator[bytes]:
    start = 0
    while start + width < len(view):
        length = int.from_bytes(view[start : start + width], "big")
        start += width
        if length:
            yield bytes(view[start : start + min(length, _HEAD_BYTES)])
        start += length


def _units_by_mark(view: memoryview) -> Iterator[bytes]:
    data = bytes(view)
    mark = data.find(b"\0\0\1")
    while mark >= 0:
        start = mark + 3
        mark = data.find(b"\0\0\1", start)
        stop = len(data) if mark < 0 else mark
        if start < stop:
            yield data[start : min(stop, start + _HEAD_BYTES)].rstrip(b"\0") or b"\0"


def _vp9_frames(packet: Any) -> Iterator[bytes]:
    """Yield the first bytes of each frame in a VP9 packet; several frames are listed in an index at its end."""
    data = memoryview(packet)
    last = data[-1]
    number, width = (last & 7) + 1, (last >> 3 & 3) + 1
    index_start = len(data) - number * width - 1
    if last & 0xE0 != 0xC0 or index_start < 1 or data[index_start - 1] != last:
        yield bytes(data[:9])
        return
    sizes = data[index_start : len(data) - 1]
    start = 0
    for frame in range(number):
        yield bytes(data[start : start + 9])
        start += int.from_bytes(sizes[frame * width : (frame + 1) * width], "little")


def _vp9_is_shown(head: bytes) -> bool:
    """Bits: marker (2), profile (2; for 3 a reserved bit), shows an earlier frame (1), type (1), is shown (1)."""
    if not head:
        return False
    bits = head[0] << (1 if head[0] >> 4 & 3 == 3 else 0)
    return bool(bits >> 3 & 1) or bool(bits >> 1 & 1)
