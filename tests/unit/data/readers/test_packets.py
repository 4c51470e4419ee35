"""Packets decoded for a frame: as few as possible, and skipping the others changes no pixel."""

from __future__ import annotations

import csv
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from everest_ds.data.readers import packets
from everest_ds.data.readers.packets import Key, Packets, open_stream, packets_from_header, scan, scan_packets
from everest_ds.data.readers.pyav import PyavReader
from tests.unit.data.readers.video_files import shown, write_ramp


def packets_of(order: list[int], keys: list[int]) -> Packets:
    """Return a stream with these times, in decoding order, and keyframes at the times ``keys``."""
    positions: dict[int | None, int] = {time: number for number, time in enumerate(order)}
    return Packets(
        pts=sorted(order),
        keys=[Key(time, time, positions[time]) for time in keys],
        positions=positions,
        held=None,
        ticks_per_s=10,
        frames_per_s=10,
    )


def ranges(source: Packets, indices: list[int]) -> list[tuple[int, int, list[int]]]:
    return [(span.key.position, span.stop, sorted(span.targets.values())) for span in source.spans(indices)]


def test_frames_after_one_keyframe_share_a_span_up_to_the_last_one_decoded() -> None:
    source = packets_of([0, 3, 1, 2, 6, 4, 5, 7, 8], keys=[0, 7])
    assert ranges(source, [1]) == [(0, 3, [1])]
    assert ranges(source, [3]) == [(0, 2, [3])]
    assert ranges(source, [2, 3]) == [(0, 4, [2, 3])]


def test_packets_between_a_frame_and_the_next_keyframe_are_left_out() -> None:
    source = packets_of(list(range(12)), keys=[0, 4, 8])
    assert ranges(source, [1, 5, 9]) == [(0, 2, [1]), (4, 6, [5]), (8, 10, [9])]
    assert ranges(source, [3, 5]) == [(0, 6, [3, 5])]  # no packets to skip in between
    assert ranges(packets_of(list(range(6)), keys=list(range(6))), [0, 2, 3, 5]) == [
        (0, 1, [0]), (2, 4, [2, 3]), (5, 6, [5]),
    ]  # fmt: skip


def test_frame_shown_before_the_keyframe_it_is_decoded_after_needs_both_groups() -> None:
    source = packets_of([0, 1, 4, 2, 3, 5], keys=[0, 4])  # an open GOP: 2 and 3 refer to 1 and 4
    assert ranges(source, [3]) == [(0, 5, [3])]
    assert ranges(source, [5]) == [(2, 6, [5])]
    assert ranges(source, [2, 5]) == [(0, 6, [2, 5])]


def decoded_packets(reader: PyavReader, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that collects the times of the packets that a reader decodes."""
    seen: list[Any] = []
    original = PyavReader._packets_of

    def spying(self: PyavReader, span: Any) -> Any:
        for packet in original(self, span):
            seen.append(packet.pts)
            yield packet

    monkeypatch.setattr(PyavReader, "_packets_of", spying)
    return seen


@pytest.mark.parametrize("held_bytes", [0, 1 << 30])
def test_all_intra_file_has_only_its_wanted_frames_decoded(
    held_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packets, "_HELD_BYTES", held_bytes)
    write_ramp(tmp_path / "intra.mp4", b_frames=0, key_every=1)
    reader = PyavReader(tmp_path / "intra.mp4")
    seen = decoded_packets(reader, monkeypatch)
    assert shown(reader.read([5, 30, 9])) == [5, 30, 9]
    times = sorted(scan_packets(tmp_path / "intra.mp4").pts or [])
    assert seen == [times[5], times[9], times[30]]


def test_file_beyond_the_limit_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ramp.mp4"
    write_ramp(path)
    for limit, holds in ((path.stat().st_size, True), (path.stat().st_size - 1, False)):
        monkeypatch.setattr(packets, "_HELD_BYTES", limit)
        container, stream = open_stream(path)
        with container:
            assert (scan(container, stream, hold=True).held is not None) is holds


def write_jpegs(path: Path, container_options: dict[str, str] | None = None, *, hidden: bool = False) -> None:
    """Write 30 flat frames, all intra-coded, at uneven times; ``hidden`` puts three before an edit list's start."""
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for index in range(30):
            image = np.full((64, 96, 3), 5 * index, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = 40 * index + index**2, Fraction(1, 1000)
            if hidden:
                frame.pts -= 100
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def both_ways(path: Path) -> tuple[Packets | None, Packets]:
    container, stream = open_stream(path)
    with container:
        return packets_from_header(container, stream), scan(container, stream, hold=False)


@pytest.mark.parametrize("name", ["jpegs.mp4", "jpegs.mov"])
def test_index_of_a_file_of_keyframes_says_what_its_packets_say(name: str, tmp_path: Path) -> None:
    write_jpegs(tmp_path / name)
    index, packets = both_ways(tmp_path / name)
    assert index == packets
    reader = PyavReader(tmp_path / name)
    assert reader.times_s().tolist() == pytest.approx([0.04 * i + i**2 / 1000 for i in range(30)], abs=1e-9)
    for wanted in ([29, 0, 7, 7, 15], list(range(30)), [3]):
        assert shown(reader.read(wanted)) == wanted


def test_index_that_does_not_tell_all_is_not_trusted(tmp_path: Path) -> None:
    write_jpegs(tmp_path / "jpegs.mkv")
    write_jpegs(tmp_path / "fragments.mp4", {"movflags": "frag_keyframe+empty_moov"})
    write_jpegs(tmp_path / "hidden.mp4", hidden=True)
    write_jpegs(tmp_path / "whole.mp4", {"movflags": "faststart"})
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "torn.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    write_ramp(tmp_path / "intra.mp4", b_frames=0, key_every=1)
    assert both_ways(tmp_path / "whole.mp4")[0] is not None
    for name, frames in (
        ("jpegs.mkv", 30), ("fragments.mp4", 30), ("hidden.mp4", 27), ("torn.mp4", None), ("intra.mp4", 40),
    ):  # fmt: skip
        index, packets = both_ways(tmp_path / name)
        assert index is None, name
        reader = PyavReader(tmp_path / name)
        assert reader.num_frames == len(packets.pts or [])
        assert reader.num_frames == frames or (frames is None and 15 < reader.num_frames < 30)


@pytest.mark.parametrize("name", ["ramp.mp4", "ramp.mkv", "ramp.ts", "ramp.avi"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libx265"])
def test_frames_are_the_same_whether_packets_are_held_or_sought(
    name: str, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "ramp.avi" and codec != "mpeg4":
        pytest.skip("not a codec of AVI files")
    write_ramp(tmp_path / name, codec=codec, b_frames=2 if codec != "mpeg4" else 0)
    wanted = [39, 0, 17, 17, 8, 9, 30]
    frames = []
    for limit in (0, 1 << 30):
        monkeypatch.setattr(packets, "_HELD_BYTES", limit)
        reader = PyavReader(tmp_path / name)
        frames.append(reader.read(wanted))
        assert np.array_equal(reader.read(wanted[:3]), frames[-1][:3])  # again, after a seek
    assert np.array_equal(*frames)
    assert shown(frames[0]) == wanted


@pytest.mark.parametrize("held_bytes", [0, 1 << 30])
def test_frames_of_real_clips_are_those_of_decoding_everything(
    held_bytes: int, real_clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle decodes every packet with plain PyAV and converts each frame separately."""
    monkeypatch.setattr(packets, "_HELD_BYTES", held_bytes)
    with (real_clips / "manifest.csv").open() as file:
        names = [row["file"] for row in csv.DictReader(file)]
    compared = 0
    for name in names:
        reader = PyavReader(real_clips / name)
        wanted = list(range(min(2, reader.num_frames - 1), min(reader.num_frames, 60), 5))
        with av.open(str(real_clips / name)) as container:
            decoded = list(islice(container.decode(container.streams.best("video")), wanted[-1] + 1))
            expected = [
                np.rot90(decoded[i].to_ndarray(format="rgb24"), round(decoded[i].rotation / 90)) for i in wanted
            ]
        assert np.array_equal(reader.read(wanted), np.stack(expected)), name
        compared += len(wanted)
    assert compared > 400
