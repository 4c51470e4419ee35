"""Re-encoding a video: its frames, their times and size, and refused sources."""

from __future__ import annotations

import errno
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from everest_ds.data.curation import reencode as prepare
from everest_ds.data.curation.preparation import Prepared, PrepareSettings, target_name
from everest_ds.data.curation.reencode import prepare_video, psnr_db, target_size
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.packets import scan_packets
from everest_ds.data.readers.video import Video
from tests.unit.data.readers.test_real_files import BAD_FILES
from tests.unit.data.readers.video_files import TURNS, corners, shown, turned_size, write_ramp, write_turned

# Encoding hardly changes flat grey frames; measured 47 dB.
MIN_PSNR_DB = 40.0
# Times are stored in ticks of 1/90000 s.
TIME_ATOL_S = 1e-4


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def made(row: VideoRow, out: Path, **changes: object) -> tuple[Prepared, Path]:
    settings = PrepareSettings(**changes)  # type: ignore[arg-type]
    return prepare_video(row, settings, out, MIN_PSNR_DB), out / target_name(row)


def times_s(path: Path) -> list[float]:
    packets = scan_packets(path)
    return packets.times_s(len(packets.pts or [])).tolist()


@pytest.mark.parametrize(("codec", "gop"), [("mjpeg", 1), ("h264", 1), ("h264", 16)])
@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_every_frame_is_kept_at_its_time(codec: str, gop: int, reader: str, tmp_path: Path, out: Path) -> None:
    write_ramp(tmp_path / "ramp.mkv")
    before = (tmp_path / "ramp.mkv").read_bytes()
    found, target = made(VideoRow(tmp_path / "ramp.mkv", 3), out, codec=codec, gop=gop, quality=4, reader=reader)
    assert found.fault is None
    assert (found.frames_in, found.frames_out, found.width, found.height) == (40, 40, 96, 64)
    assert found.bytes_after == target.stat().st_size
    assert found.psnr_db is not None
    assert MIN_PSNR_DB < found.psnr_db <= 100
    video = Video(target, reader=reader)  # type: ignore[arg-type]
    assert shown(video.read(range(video.num_frames))) == list(range(40))
    assert times_s(target) == pytest.approx([i / 10 for i in range(40)], abs=TIME_ATOL_S)
    with av.open(str(target)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert keys == [number % gop == 0 for number in range(40)]
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert (tmp_path / "ramp.mkv").read_bytes() == before


def test_window_becomes_a_file_of_its_own_that_starts_at_zero(tmp_path: Path, out: Path) -> None:
    write_ramp(tmp_path / "ramp.mp4")
    rows = [VideoRow(tmp_path / "ramp.mp4", 0, start_s=start, end_s=start + 1) for start in (0.5, 2.0)]
    for row, first in zip(rows, (5, 20), strict=True):
        found, target = made(row, out)
        assert (found.frames_in, found.frames_out) == (10, 10)
        assert shown(Video(target).read(range(10))) == list(range(first, first + 10))
        assert times_s(target) == pytest.approx([i / 10 for i in range(10)], abs=TIME_ATOL_S)
    found, _ = made(VideoRow(tmp_path / "ramp.mp4", 0, start_s=9.0, end_s=10.0), out)
    assert "no frame starts in its window [9, 10) s" in (found.fault or "")


def test_every_third_frame_of_a_window_keeps_its_time(tmp_path: Path, out: Path) -> None:
    write_ramp(tmp_path / "ramp.mp4")
    found, target = made(VideoRow(tmp_path / "ramp.mp4", 0, start_s=0.5, end_s=1.5), out, keep_every=3)
    assert (found.frames_in, found.frames_out) == (10, 4)
    assert shown(Video(target).read(range(4))) == [5, 8, 11, 14]
    assert times_s(target) == pytest.approx([0.0, 0.3, 0.6, 0.9], abs=TIME_ATOL_S)


def test_uneven_times_stay_uneven(tmp_path: Path, out: Path) -> None:
    expected = [0.0, 0.04, 0.2, 0.9, 0.95, 3.0]
    with av.open(str(tmp_path / "uneven.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for time in expected:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 90, dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found, target = made(VideoRow(tmp_path / "uneven.mp4", 0), out)
    assert found.frames_out == 6
    assert times_s(target) == pytest.approx(expected, abs=1e-3)


def test_single_frame_is_a_video_too(tmp_path: Path, out: Path) -> None:
    write_ramp(tmp_path / "one.mp4", 1)
    found, target = made(VideoRow(tmp_path / "one.mp4", 0), out)
    assert (found.fault, found.frames_out) == (None, 1)
    assert shown(Video(target).read([0])) == [0]


@pytest.mark.parametrize("turn", TURNS)
def test_turn_is_applied_once(turn: str, tmp_path: Path, out: Path) -> None:
    write_turned(tmp_path / "turned.mp4", turn)
    found, target = made(VideoRow(tmp_path / "turned.mp4", 0), out)
    assert (found.width, found.height) == turned_size(turn)
    for reader in ("pyav", "decord"):
        frames = Video(target, reader=reader).read([0, 2])  # type: ignore[arg-type]
        assert np.abs(np.array(corners(frames)) - TURNS[turn][1]).max() < 6  # measured: 2


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((1280, 720), 256, (456, 256)),
        ((720, 1280), 256, (256, 456)),
        ((340, 256), 256, (340, 256)),
        ((320, 240), 256, (320, 240)),
        ((341, 255), 256, (340, 254)),
        ((641, 481), None, (640, 480)),
        ((300, 300), 128, (128, 128)),
        ((1, 7), 256, (0, 6)),
    ],
)
def test_size_is_even_and_never_larger(
    size: tuple[int, int], short_side: int | None, expected: tuple[int, int]
) -> None:
    assert target_size(*size, short_side) == expected


def test_large_video_shrinks_and_an_odd_one_loses_an_edge(tmp_path: Path, out: Path) -> None:
    write_ramp(tmp_path / "wide.avi", codec="mpeg4", b_frames=0, width=97)
    for short_side, size in ((256, (96, 64)), (32, (48, 32))):
        found, target = made(VideoRow(tmp_path / "wide.avi", 0), out, short_side=short_side, reader="pyav")
        assert (found.fault, found.width, found.height) == (None, *size)
        frames = Video(target, reader="pyav").read(range(40))
        assert frames.shape == (40, size[1], size[0], 3)
        assert shown(frames) == list(range(40))


def test_poor_copy_is_refused_and_leaves_nothing_behind(tmp_path: Path, out: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 96, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "noise.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        for image in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    found, target = made(VideoRow(tmp_path / "noise.mkv", 0), out)
    assert found.fault is not None
    assert found.fault.startswith("its worst frame has a PSNR of ")
    assert "--min-psnr is 40 dB" in found.fault
    assert list(target.parent.iterdir()) == []


def test_frame_that_is_lost_or_late_is_found(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ramp(tmp_path / "ramp.mp4")
    row = VideoRow(tmp_path / "ramp.mp4", 0)
    encode = prepare._encode

    def lose_the_last(path, frames, times, settings):  # type: ignore[no-untyped-def]
        return encode(path, (f for i, f in zip(range(39), frames, strict=False)), times[:39], settings)

    def delay(path, frames, times, settings):  # type: ignore[no-untyped-def]
        return encode(path, frames, times + 0.02 * (times > 1), settings)

    for broken, fault in ((lose_the_last, "40 frames were encoded, the file has 39"), (delay, "is off by 0.020 s")):
        monkeypatch.setattr(prepare, "_encode", broken)
        found, target = made(row, out)
        assert fault in (found.fault or "")
        assert not target.exists()


def test_full_disk_is_no_fault_of_the_video(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ramp(tmp_path / "ramp.mp4", 3)

    def fail(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare, "_encode", fail)
    found, target = made(VideoRow(tmp_path / "ramp.mp4", 0), out)
    assert found.is_disk_full
    assert "No space left on device" in (found.fault or "")
    assert list(target.parent.iterdir()) == []


def test_file_in_the_way_is_a_fault_in_words(tmp_path: Path, out: Path) -> None:
    write_ramp(tmp_path / "ramp.mp4", 3)
    out.mkdir()
    (out / "videos").write_text("a file")
    found, _ = made(VideoRow(tmp_path / "ramp.mp4", 0), out)
    assert (found.fault or "").startswith("cannot be written: ")
    assert not found.is_disk_full


def test_name_tells_parts_of_a_video_apart_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    video = tmp_path / "a" / "ü b.mp4"
    video.touch()
    (tmp_path / "link.mp4").symlink_to(video)
    name = target_name(VideoRow(video, 0))
    assert name.startswith("videos/a/ü b-")
    assert len(name) == len("videos/a/ü b-01234567.mp4")
    assert target_name(VideoRow(tmp_path / "link.mp4", 5)) == name
    assert target_name(VideoRow(tmp_path / "a" / ".." / "a" / "ü b.mp4", 5)) == name
    others = {target_name(VideoRow(video, 0, start_s=1.0, end_s=end)) for end in (2.0, 3.0)}
    others.add(target_name(VideoRow(tmp_path / "b" / "ü b.mp4", 0)))
    assert len(others | {name}) == 4
    assert len(Path(target_name(VideoRow(tmp_path / ("é" * 120 + ".mp4"), 0))).name.encode()) < 250


def test_signal_to_noise_is_that_of_plain_python() -> None:
    draw = np.random.default_rng(1)
    one, other = (draw.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in range(2))
    errors = [(int(a) - int(b)) ** 2 for a, b in zip(one.flat, other.flat, strict=True)]
    assert psnr_db(one, other) == pytest.approx(10 * math.log10(255**2 / (sum(errors) / len(errors))), rel=1e-6)
    assert psnr_db(one, one) == 100


def test_bad_sources_are_faults_in_words_or_prepared_as_far_as_they_are_read(real_clips: Path, out: Path) -> None:
    """Faults are those of reading with PyAV alone, except that frames of 1x1 pixels cannot be encoded."""
    for name, expected in BAD_FILES.items():
        if isinstance(expected, tuple):
            expected = expected[0]
        if name == "real_1x1.mp4":
            expected = "its frames of 1x1 pixels are too small to encode"
        settings = PrepareSettings(reader="pyav")
        found = prepare_video(VideoRow(real_clips / "bad" / name, 0), settings, out, 25.0)
        target = out / target_name(VideoRow(real_clips / "bad" / name, 0))
        if isinstance(expected, int):
            assert (found.fault, found.frames_in) == (None, expected), name
            assert Video(target, reader="pyav").num_frames == expected
        else:
            # A missing frame may be detected before later damage that cannot be decoded.
            assert any(reason in (found.fault or "") for reason in (expected, "cannot be decoded")), name
            assert not target.exists()
    assert not list(out.rglob("*.partial"))


def test_file_is_the_same_byte_for_byte_when_made_again(tmp_path: Path, out: Path) -> None:
    write_ramp(tmp_path / "ramp.mp4")
    for codec, gop in (("mjpeg", 1), ("h264", 8)):
        contents = set()
        for _ in range(3):
            _, target = made(VideoRow(tmp_path / "ramp.mp4", 0), out, codec=codec, gop=gop)
            contents.add(target.read_bytes())
        assert len(contents) == 1
