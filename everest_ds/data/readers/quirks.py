"""What makes the frames of a file hard to find by number, and where packets do not tell which frames there are."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from enum import StrEnum
from itertools import pairwise
from typing import cast


class Quirk(StrEnum):
    """What makes the frames of a file hard to find by number; each value is the reason in words."""

    NO_TIMES = "its packets do not say when each frame is shown"
    DECODING_TIMES = "its times may be those of decoding, and it may have B-frames"
    BACK_IN_TIME = "its times run backwards at a keyframe"
    LATE_START = "it does not begin with a keyframe"
    LEADS_START = "it shows frames that come before its first keyframe"
    OPEN_GOP = "its frames refer to frames beyond a keyframe (open GOPs)"
    REFERS_AHEAD = "its MPEG-4 frames refer to later ones (B-frames)"
    UNCLEAN_KEYS = "decoding cannot start at some of its keyframes (intra refresh, for instance)"
    INVISIBLE = "some of its packets show no frame of their own"
    HIDDEN = "an edit list hides some of its frames"
    DAMAGED = "some of its packets are damaged"
    CHANGING = "its frames may change their size on the way"
    INTERLACED = "its frames are interlaced"
    TURNED_BY_FRAMES = "its frames, not its header, say how to turn the picture"


# Where frames are found by the times of their packets: tests/unit/test_reader_oracle.py tries these containers and
# codecs. Codecs that have keyframes alone are others.
_TIMED_CONTAINERS = {"mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf"}
_TIMED_CODECS = {
    "h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg1video", "mpeg2video", "ffv1", "flv1", "msmpeg4v2",
    "msmpeg4v3", "wmv1", "wmv2",
}  # fmt: skip
# Of these containers the times are those of decoding.
_DECODING_TIMES = {"avi", "asf"}
# Of these containers a packet of H.264 is a frame; of others it may be a field, half of one.
_FRAME_PACKETS = {"mov", "matroska"}
# With these, numbers and times of packets are not those of frames.
_UNTIMED = {
    Quirk.NO_TIMES, Quirk.DECODING_TIMES, Quirk.BACK_IN_TIME, Quirk.LATE_START, Quirk.LEADS_START,
    Quirk.INVISIBLE,
}  # fmt: skip


def has_trusted_times(container: str, codec: str, *, is_intra_only: bool, quirks: AbstractSet[Quirk]) -> bool:
    """Return whether the times of packets say which frames there are, and which packet each of them is in.

    Container and codec are FFmpeg's names, of formats the first one; an intra-only codec has keyframes alone.
    """
    is_tried = container in _TIMED_CONTAINERS and (is_intra_only or codec in _TIMED_CODECS)
    return is_tried and not quirks & _UNTIMED


def time_quirks(times: Sequence[int | None], hidden: AbstractSet[int], keys: Sequence[int]) -> set[Quirk]:
    """Return what is odd about the times at which packets are shown.

    Args:
        times: One for each packet, in the order of decoding.
        hidden: Numbers of packets that are not shown.
        keys: Numbers of packets that are keyframes, ascending.
    """
    found = {Quirk.HIDDEN} if hidden else set()
    if not keys or keys[0] > 0:
        found.add(Quirk.LATE_START)
    if None in times or len(set(times)) < len(times):
        return found | {Quirk.NO_TIMES}
    ordered = cast(Sequence[int], times)
    latest, earlier_key = None, None
    for key, stop in pairwise([*keys, len(times)]):
        leading = [number for number in range(key, stop) if ordered[number] < ordered[key]]
        if latest is not None and latest >= ordered[key]:
            found.add(Quirk.BACK_IN_TIME)
        if leading:
            found.add(Quirk.OPEN_GOP)
            if earlier_key is None and not hidden >= set(leading):
                found.add(Quirk.LEADS_START)
            if earlier_key is not None and min(ordered[number] for number in leading) < ordered[earlier_key]:
                found.add(Quirk.BACK_IN_TIME)
        latest, earlier_key = max(ordered[key:stop]), key
    return found


def order_quirks(
    container: str, codec: str, times: Sequence[int | None], *, has_b_frames: bool, refers_ahead: Callable[[], bool]
) -> set[Quirk]:
    """Return whether times are those of decoding, where frames are shown in another order.

    Args:
        container: FFmpeg's first name of the format.
        codec: FFmpeg's name of the codec.
        times: One for each packet, in the order of decoding.
        has_b_frames: Whether the decoder expects frames in another order.
        refers_ahead: Tells whether there really are B-frames; called only where nothing else tells.
    """
    if not has_b_frames:
        return set()
    known = [time for time in times if time is not None]
    # Times that never go back, where B-frames make them go back. MPEG-4 is looked at packet by packet.
    in_order = codec != "mpeg4" and known == sorted(known) and refers_ahead()
    return {Quirk.DECODING_TIMES} if container in _DECODING_TIMES or in_order else set()


def field_quirks(container: str, codec: str, *, is_interlaced: bool) -> set[Quirk]:
    """Return what interlacing means for the frames of a file."""
    if not is_interlaced:
        return set()
    is_field = codec == "h264" and container not in _FRAME_PACKETS
    return {Quirk.INTERLACED, Quirk.INVISIBLE} if is_field else {Quirk.INTERLACED}
