"""Quirks of a file that its packets show, from hand-written times and bytes."""

from __future__ import annotations

import pytest

from everest_ds.data.readers.bitstream import Inspector
from everest_ds.data.readers.quirks import Quirk, order_quirks, time_quirks


@pytest.mark.parametrize(
    ("times", "hidden", "keys", "expected"),
    [
        ([0, 3, 1, 2, 4, 6, 5], set(), [0, 4], set()),
        ([0, 1, 4, 2, 3, 5], set(), [0, 2], {Quirk.OPEN_GOP}),  # 2 and 3 are shown before keyframe 4
        ([2, 0, 1, 3], set(), [0], {Quirk.OPEN_GOP, Quirk.LEADS_START}),
        ([2, 0, 1, 3], {1, 2}, [0], {Quirk.OPEN_GOP, Quirk.HIDDEN}),  # 1 and 2 are not shown
        ([0, 1, 2, 3], {0, 1}, [0], {Quirk.HIDDEN}),
        ([0, 1, 2, 0, 1, 2], set(), [0, 3], {Quirk.NO_TIMES}),  # two files joined into one
        ([0, 2, 4, 1, 3, 5], set(), [0, 3], {Quirk.BACK_IN_TIME}),
        ([0, 1, 2, 3, 8, 1.5, 9], set(), [0, 2, 4], {Quirk.OPEN_GOP, Quirk.BACK_IN_TIME}),
        ([0, None, 2], set(), [0], {Quirk.NO_TIMES}),
        ([0, 1, 2], set(), [1], {Quirk.LATE_START}),
        ([0, 1, 2], set(), [], {Quirk.LATE_START}),
    ],
)
def test_odd_times_names_what_makes_frames_hard_to_find(
    times: list[int | None], hidden: set[int], keys: list[int], expected: set[Quirk]
) -> None:
    assert time_quirks(times, hidden, keys) == expected


def test_times_in_order_are_those_of_decoding_where_there_are_b_frames() -> None:
    def odd(container: str, times: list[int | None], refers_ahead: bool) -> set[Quirk]:
        return order_quirks(container, "h264", times, has_b_frames=True, refers_ahead=lambda: refers_ahead)

    assert odd("mov", [0, 1, 2, 3], True) == {Quirk.DECODING_TIMES}
    assert odd("mov", [0, 1, 2, 3], False) == set()
    assert odd("mov", [0, 3, 1, 2], True) == set()
    assert odd("avi", [0, 3, 1, 2], True) == {Quirk.DECODING_TIMES}
    assert order_quirks("avi", "h264", [0, 1], has_b_frames=False, refers_ahead=lambda: True) == set()


IDR, SLICE_I, SLICE_P = b"\x65\x88\x80", b"\x41\xb0\x80", b"\x41\x9a\x80"
RECOVERY_AT_ONCE, RECOVERY_LATER, TURNED = (
    b"\x06\x06\x01\xc4\x80",
    b"\x06\x06\x01\x24\x80",
    b"\x06\x2f\x02\xa0\x10\x80",
)


@pytest.mark.parametrize(
    ("units", "is_clean"),
    [
        ([IDR], True),
        ([RECOVERY_AT_ONCE, SLICE_I], True),  # open GOP
        ([TURNED + b"\x80", RECOVERY_AT_ONCE, SLICE_I], True),
        ([RECOVERY_LATER, SLICE_P], False),  # intra refresh
        ([SLICE_I], False),
        ([], False),
    ],
)
@pytest.mark.parametrize("by_length", [False, True])
def test_h264_keyframe_is_clean_where_everything_can_be_decoded_at_once(
    units: list[bytes], is_clean: bool, by_length: bool
) -> None:
    if by_length:
        packet = b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)
    else:
        packet = b"".join(b"\0\0\0\1" + unit for unit in units)
    inspector = Inspector("h264", b"\x01\x64\x00\x0a\xff" if by_length else None)
    assert inspector.starts_clean(packet) is is_clean
    assert (Quirk.UNCLEAN_KEYS in inspector.quirks) is not is_clean
    assert (Quirk.TURNED_BY_FRAMES in inspector.quirks) is any(unit.startswith(b"\x06\x2f") for unit in units)


# VP9: 0x82 is a keyframe that is shown, 0x86 another shown frame, 0x84 a hidden one, 0x88 shows an earlier one.
@pytest.mark.parametrize(
    ("packet", "is_visible"),
    [
        (b"\x82\x49\x83\x42\x00\x03\xf0\x02\xf0", True),
        (b"\x86\x00\x01", True),
        (b"\x88", True),
        (b"\x84\x00\x01", False),
        (b"\x84\x00\x01" + b"\x86\x00" + b"\xc1\x03\x02\xc1", True),  # two frames and their lengths in a packet
        (b"\x86\x00\x01" + b"\x86\x00" + b"\xc1\x03\x02\xc1", False),
    ],
)
def test_vp9_packet_that_does_not_show_one_frame_is_noticed(packet: bytes, is_visible: bool) -> None:
    inspector = Inspector("vp9", None)
    inspector.look(packet)
    assert (Quirk.INVISIBLE in inspector.quirks) is not is_visible


def test_picture_that_changes_its_size_is_noticed() -> None:
    inspector = Inspector("vp8", None)
    for size, expected in ((b"\x40\x00\x30\x00", False), (b"\x40\x00\x30\x00", False), (b"\x80\x00\x60\x00", True)):
        inspector.look(b"\x10\x02\x00\x9d\x01\x2a" + size)
        assert (Quirk.CHANGING in inspector.quirks) is expected
