"""Quirks of files: what makes frames hard to find by number, and when packets do not say which frames there are."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from enum import StrEnum
from itertools import pairwise
from typing import cast


class Quirk(StrEnum):
    """What makes the frames of a file hard to find by number; each value is the reason in words."""

    NO_TIMES = "its packets do not say when each frame is shown"
    DECODING_TIMES = "its times may be decoding times, and it may have B-frames"
    BACK_IN_TIME = "its times run backwards at a keyframe"
    LATE_START = "it does not begin with a keyframe"
    LEADS_START = "it shows frames that come before its first keyframe"
    OPEN_GOP = "its frames refer to frames beyond a keyframe (open GOPs)"
    REFERS_AHEAD = "its MPEG-4 frames refer to later ones (B-frames)"
    UNCLEAN_KEYS = "decoding cannot start at some of its keyframes (intra refresh, for instance)"
    INVISIBLE = "some of its packets show no frame of their own"
    HIDDEN = "an edit list hides some of its frames"
    DAMAGED = "some of its packets are damaged"
    CHANGING = "its frames may change size"
    INTERLACED = "its frames are interlaced"
    TURNED_BY_FRAMES = "its frames, not its header, say how to rotate the picture"


# Containers and codecs whose frames are found by the times of their packets; the reader oracle in
# tests/unit/data/readers tries them. Codecs of keyframes only need no entry.
_TIMED_CONTAINERS = {"mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf"}
_TIMED_CODECS = {
    "h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg1video", "mpeg2video", "ffv1", "flv1", "msmpeg4v2",
    "msmpeg4v3", "wmv1", "wmv2",
}  # fmt: skip
# Containers that store decoding times only.
_DECODING_TIMES = {"avi", "asf"}
# Containers in which an H.264 packet is a whole frame; in others it may be a field, half of a frame.
_FRAME_PACKETS = {"mov", "matroska"}
# With these quirks, the numbers and times of packets are not those of frames.
_UNTIMED = {
    Quirk.NO_TIMES, Quirk.DECODING_TIMES, Quirk.BACK_IN_TIME, Quirk.LATE_START, Quirk.LEADS_START,
    Quirk.INVISIBLE,
}  # fmt: skip


def has_trusted_times(container: str, codec: str, *, is_intra_only: bool, quirks: AbstractSet[Quirk]) -> bool:
    """Return whether the times of packets say which frames there are, and which packet contains each of them.

    Container (first name of the format) and codec are FFmpeg's names; an intra-only codec has keyframes only.
    """
    is_tried = container in _TIMED_CONTAINERS and (is_intra_only or codec in _TIMED_CODECS)
    return is_tried and not quirks & _UNTIMED


def time_quirks(times: Sequence[int | None], hidden: AbstractSet[int], keys: Sequence[int]) -> set[Quirk]:
    """Return the quirks of the packets' presentation times.

    Args:
        times: Presentation time of each packet in ticks, in decoding order; None if it has none.
        hidden: Numbers of the packets that are not shown.
        keys: Numbers of the packets that are keyframes, ascending.
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
    """Return DECODING_TIMES if frames are reordered and the packets' times are decoding times.

    Args:
        container: First of FFmpeg's names of the format.
        codec: FFmpeg's name of the codec.
        times: Time of each packet in ticks, in decoding order; None if it has none.
        has_b_frames: Whether the decoder expects reordered frames.
        refers_ahead: Returns whether there really are B-frames; called only if nothing else decides.
    """
    if not has_b_frames:
        return set()
    known = [time for time in times if time is not None]
    # With B-frames, presentation times go back in decoding order; times that never do are decoding times. MPEG-4 is
    # inspected packet by packet instead.
    in_order = codec != "mpeg4" and known == sorted(known) and refers_ahead()
    return {Quirk.DECODING_TIMES} if container in _DECODING_TIMES or in_order else set()


def field_quirks(container: str, codec: str, *, is_interlaced: bool) -> set[Quirk]:
    """Return the quirks of an interlaced file: packets may be fields instead of frames."""
    if not is_interlaced:
        return set()
    is_field = codec == "h264" and container not in _FRAME_PACKETS
    return {Quirk.INTERLACED, Quirk.INVISIBLE} if is_field else {Quirk.INTERLACED}
