"""Truncated files are detected by their video stream alone, whatever other streams exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from everest_ds.data.curation.probe import Finding, Kind, ProbeSettings, probe_video
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.container import Container, describe_missing, read_container
from tests.unit.data.curation.test_probe import moving_video
from tests.unit.data.readers.stream_files import StreamFile, cut_off

STREAMS: dict[str, Callable[[StreamFile], StreamFile]] = {
    "longer_sound": lambda file: file.picture(3).sound(8),
    "shorter_sound": lambda file: file.picture(6).sound(1),
    "later_sound": lambda file: file.picture(3).sound(4, start_s=4),
    "later_picture": lambda file: file.picture(3, start_s=4).sound(8),
    "longer_picture": lambda file: file.picture(3).picture(8),
    "shorter_picture": lambda file: file.picture(8).picture(3),
    "b_frames": lambda file: file.picture(3, b_frames=2).sound(8),
    "long_subtitle": lambda file: file.picture(3).text(20),
    "late_subtitle": lambda file: file.picture(3).text(1, start_s=30),
    "cover": lambda file: file.cover().picture(3).sound(8),
}
CONTAINERS = {
    "webm": set(STREAMS) - {"cover", "b_frames"},
    "mkv": set(STREAMS),
    "mp4": set(STREAMS) - {"cover"},
    "mov": set(STREAMS) - {"cover"},
    "ts": set(STREAMS) - {"cover"},
    "avi": {"longer_sound", "shorter_sound", "later_sound", "later_picture"},
    "flv": {"longer_sound", "shorter_sound", "later_sound", "later_picture"},
}


def probe(path: Path) -> Finding:
    return probe_video(VideoRow(path, 0), ProbeSettings(reader="pyav"))


@pytest.mark.parametrize(
    ("suffix", "streams"), [(suffix, name) for suffix, names in CONTAINERS.items() for name in sorted(names)]
)
def test_sound_file_is_not_cut_off_whatever_other_streams_it_has(suffix: str, streams: str, tmp_path: Path) -> None:
    path = STREAMS[streams](StreamFile(tmp_path / f"a.{suffix}")).write()
    assert probe(path).kind is Kind.GOOD


@pytest.mark.parametrize("movflags", ["frag_keyframe+empty_moov", "dash+frag_keyframe+global_sidx"])
def test_fragmented_file_with_longer_sound_is_not_cut_off(movflags: str, tmp_path: Path) -> None:
    path = StreamFile(tmp_path / "a.mp4", movflags=movflags).picture(3).sound(8).write()
    assert probe(path).kind is Kind.GOOD


@pytest.mark.parametrize(
    ("suffix", "streams", "share"),
    [
        ("mkv", "longer_picture", 0.3),
        ("mkv", "long_subtitle", 0.5),
        ("mkv", "shorter_sound", 0.5),
        ("mkv", "later_picture", 0.5),
        ("webm", "shorter_sound", 0.5),
        ("webm", "long_subtitle", 0.5),
        ("avi", "shorter_sound", 0.5),
    ],
)
def test_file_whose_picture_was_cut_off_is_found(suffix: str, streams: str, share: float, tmp_path: Path) -> None:
    whole = STREAMS[streams](StreamFile(tmp_path / f"a.{suffix}")).write()
    assert probe(cut_off(whole, share)).kind is Kind.TRUNCATED


def test_cut_off_mp4_is_found_by_its_picture_and_not_by_its_sound(tmp_path: Path) -> None:
    whole = StreamFile(tmp_path / "a.mp4", movflags="faststart").picture(4).sound(12).write()
    container = read_container(cut_off(whole, 0.95))  # only sound is missing
    assert container is not None
    assert container.declared_s == pytest.approx(4)
    assert describe_missing(container) is None
    container = read_container(cut_off(whole, 0.4))
    assert container is None or describe_missing(container) is not None


def test_container_is_read_without_decoding(tmp_path: Path) -> None:
    container = read_container(moving_video(tmp_path / "a.mp4"))
    assert container is not None
    assert (container.packets, container.declared, container.hidden) == (20, 20, 0)
    assert container.starts_with_key
    assert container.declared_s == pytest.approx(20 / 30, abs=0.01)
    assert container.end_s == pytest.approx(20 / 30, abs=0.04)
    (tmp_path / "text.mp4").write_text("no video")
    assert read_container(tmp_path / "text.mp4") is None


@pytest.mark.parametrize(
    ("declared", "packets", "declared_s", "end_s", "file_s", "file_end_s", "says"),
    [
        (100, 100, 10.0, 10.0, 10.0, 10.0, None),
        (0, 100, None, 10.0, None, 10.0, None),
        (100, 91, None, 9.1, None, 9.1, None),  # up to a tenth may be missing
        (100, 89, None, 8.9, None, 8.9, "announces 100 frames, it contains 89"),
        (0, 50, 10.0, 5.0, 10.0, 10.0, "announces 10.0 s of video, its last frame ends at 5.0 s"),
        (0, 10, 1.0, 0.6, 1.0, 0.6, None),  # less than half a second is missing
        (100, 50, 10.0, 9.9, 10.0, 9.9, None),  # an edit list hides the other frames
        (0, 30, 3.0, 3.0, 8.0, 3.0, None),  # the sound is longer, and its end may be missing
        (0, 30, None, 3.0, 8.0, 8.0, None),
        (0, 30, None, 3.0, 8.0, 3.5, "announces 8.0 s, the last packet of any stream ends at 3.5 s"),
    ],
)
def test_what_a_header_announces_has_to_be_there(
    declared: int,
    packets: int,
    declared_s: float | None,
    end_s: float,
    file_s: float | None,
    file_end_s: float,
    says: str | None,
) -> None:
    found = describe_missing(
        Container(
            packets=packets,
            declared=declared,
            declared_s=declared_s,
            end_s=end_s,
            starts_with_key=True,
            hidden=0,
            file_s=file_s,
            file_end_s=file_end_s,
        )
    )
    assert (found is None) == (says is None)
    assert says is None or says in (found or "")


def test_webm_whose_header_lacks_the_pictures_length_is_held_against_all_streams(tmp_path: Path) -> None:
    path = STREAMS["longer_sound"](StreamFile(tmp_path / "a.webm")).write()
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"NOLENGTH"))
    container = read_container(path)
    assert container is not None
    assert container.declared_s is None
    assert container.end_s == pytest.approx(3.0, abs=0.2)
    assert container.file_s == pytest.approx(8.0, abs=0.2)
    assert probe(path).kind is Kind.GOOD
    assert probe(cut_off(path, 0.2)).kind is Kind.TRUNCATED


def test_given_file_with_longer_sound_is_good(real_clips: Path) -> None:
    assert probe(real_clips / "tricky" / "longaudio.webm").kind is Kind.GOOD
