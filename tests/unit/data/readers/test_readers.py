from __future__ import annotations

import gc
import importlib
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from everest_ds.data.readers import choice
from everest_ds.data.readers.base import VideoReadError, first_line
from everest_ds.data.readers.choice import READERS, choose_reader, obstacle, open_reader
from everest_ds.data.readers.video import DecodedVideo, Video
from everest_ds.errors import UserError
from tests.unit.data.readers.video_files import shown, write_ramp

# File -> codec, number of B-frames. Containers with and without an index, with and without presentation times.
KINDS = {
    "b_frames.mp4": ("libx264", 2),
    "intra.mp4": ("libx264", 0),
    "b_frames.mkv": ("libx264", 2),
    "b_frames.ts": ("libx264", 2),
    "plain.avi": ("mpeg4", 0),
    "b_frames.avi": ("mpeg4", 2),
    "hevc.mp4": ("libx265", 3),
}


@pytest.fixture(params=list(READERS))
def reader(request: pytest.FixtureRequest) -> str:
    fault = obstacle(request.param)
    if fault:
        pytest.skip(f"{request.param} {fault}")
    return str(request.param)


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ramps é")  # not ASCII on purpose
    for name, (codec, b_frames) in KINDS.items():
        write_ramp(folder / name, codec=codec, b_frames=b_frames, key_every=1 if name == "intra.mp4" else 8)
    return folder


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Clear the cache of usable readers before and after a test."""
    obstacle.cache_clear()
    yield
    obstacle.cache_clear()


# See test_reader_oracle.py for more kinds.
REFUSED = {
    ("decord", "b_frames.ts"),
    ("decord", "b_frames.avi"),
    ("decord", "hevc.mp4"),
    ("torchcodec", "b_frames.ts"),
    ("torchcodec", "b_frames.avi"),
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_come_by_number_in_any_order_or_are_refused(name: str, reader: str, ramps: Path) -> None:
    if (reader, name) in REFUSED:
        with pytest.raises(
            VideoReadError, match=rf"^.*{reader} may return wrong frames: .*use --data\.reader pyav "
        ):
            Video(ramps / name, reader=reader)  # type: ignore[arg-type]
        return
    video = Video(ramps / name, reader=reader)  # type: ignore[arg-type]
    assert video.num_frames == 40
    for wanted in ([39, 0, 17, 17, 8], [5], list(range(40)), [39], [7, 8, 9], [23, 3]):
        frames = video.read(wanted)
        assert frames.shape == (len(wanted), 64, 96, 3)
        assert frames.dtype == np.uint8
        assert shown(frames) == wanted


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("start_s", "end_s", "first", "last"),
    [
        (0.5, 1.0, 5, 9),
        (0.0, 4.0, 0, 39),
        (0.45, 0.95, 5, 9),
        (0.5003, 1.0003, 5, 9),  # times rounded differently
        (None, 0.3, 0, 2),
        (3.7, None, 37, 39),
        (3.7, 99.0, 37, 39),
        (1.2, 1.25, 12, 12),
    ],
)
def test_window_is_the_frames_that_start_in_it(
    name: str, start_s: float | None, end_s: float | None, first: int, last: int, reader: str, ramps: Path
) -> None:
    if (reader, name) in REFUSED:
        pytest.skip("refused")
    video = Video(ramps / name, reader=reader, start_s=start_s, end_s=end_s)  # type: ignore[arg-type]
    assert video.num_frames == last - first + 1
    assert shown(video.read([0, video.num_frames - 1])) == [first, last]
    with pytest.raises(IndexError, match=f"has {video.num_frames} frames"):
        video.read([video.num_frames])


@pytest.mark.parametrize("window", [(4.0, 5.0), (1.21, 1.25), (2.0, 2.0), (2.0, 1.0), (-3.0, -1.0)])
def test_window_without_a_frame_is_a_fault_of_the_video(
    window: tuple[float, float], reader: str, ramps: Path
) -> None:
    start_s, end_s = window
    with pytest.raises(VideoReadError) as caught:
        Video(ramps / "b_frames.mp4", reader=reader, start_s=start_s, end_s=end_s)  # type: ignore[arg-type]
    assert f"[{start_s:g}, {end_s:g}) s" in caught.value.reason
    assert "40 frames starts at 3.900 s" in caught.value.reason


def test_kept_frames_are_those_of_the_window_only(reader: str, ramps: Path) -> None:
    part = Video(ramps / "b_frames.mp4", reader=reader, start_s=1.0, end_s=1.5)  # type: ignore[arg-type]
    video = DecodedVideo(part)
    assert video.num_frames == 5
    assert shown(video.read([4, 0, 2])) == [14, 10, 12]
    held = [value for value in vars(video).values() if isinstance(value, np.ndarray)]
    assert [array.shape for array in held] == [(5, 64, 96, 3)]
    with pytest.raises(IndexError):
        video.read([5])


def test_frames_outlive_their_reader_and_are_the_callers_own(reader: str, ramps: Path) -> None:
    path = ramps / "b_frames.mp4"
    video = Video(path, reader=reader)  # type: ignore[arg-type]
    first, again = video.read([3, 20]), video.read([3, 20])
    first[:] = 0  # other frames must not share this memory
    del video
    gc.collect()
    for _ in range(20):  # would overwrite freed memory
        Video(path, reader=reader).read([30, 39])  # type: ignore[arg-type]
    assert shown(again) == [3, 20]
    assert not first.any()


def test_name_that_looks_like_a_protocol_is_a_file(
    reader: str, ramps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("clip 1, é.mp4" if reader != "pyav" else "http:clip é.mp4")
    name.write_bytes((ramps / "b_frames.mp4").read_bytes())
    assert Video(name, reader=reader).num_frames == 40  # type: ignore[arg-type]


def test_missing_empty_and_torn_files_say_so(reader: str, ramps: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "torn.mp4").write_bytes((ramps / "b_frames.mp4").read_bytes()[:900])
    (tmp_path / "folder.mp4").mkdir()
    for name, reason in (("gone", "no such file"), ("empty", "is empty"), ("torn", ""), ("folder", "")):
        with pytest.raises(VideoReadError) as caught:
            Video(tmp_path / f"{name}.mp4", reader=reader)  # type: ignore[arg-type]
        assert caught.value.path.stem == name
        assert reason in caught.value.reason
        assert caught.value.reason
        assert "\n" not in caught.value.reason
        assert not caught.value.reason.startswith("[")


@pytest.mark.parametrize("width", [16, 24, 48, 72])
def test_width_that_decord_cannot_hand_out_names_the_reader_that_can(width: int, tmp_path: Path) -> None:
    if obstacle("decord"):
        pytest.skip("decord is not installed")
    write_ramp(tmp_path / "narrow.mp4", 6, width=width)
    with pytest.raises(VideoReadError, match=r"this width; use --data\.reader pyav"):
        Video(tmp_path / "narrow.mp4", reader="decord").read([0, 5])
    assert shown(Video(tmp_path / "narrow.mp4", reader="pyav").read([5, 0])) == [5, 0]


def test_auto_takes_pyav_then_decord_then_torchcodec(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("decord", "torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    assert choose_reader("auto") == "pyav"
    obstacle.cache_clear()
    monkeypatch.setitem(sys.modules, "av", None)
    assert choose_reader("auto") == "decord"
    (tmp_path / "some.mp4").write_bytes(b"some bytes of it")
    with pytest.raises(VideoReadError, match="decord needs PyAV to inspect the file first"):
        open_reader(tmp_path / "some.mp4", "auto")
    obstacle.cache_clear()
    monkeypatch.setitem(sys.modules, "decord", None)
    assert choose_reader("auto") == "torchcodec"
    with pytest.raises(UserError, match=r"data\.reader=decord is not available: .*everest doctor"):
        choose_reader("decord")
    obstacle.cache_clear()
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UserError, match=r"no library that reads videos: pyav .*, decord .*, torchcodec "):
        choose_reader("auto")


def test_obstacle_tells_absent_from_broken(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.READERS, "torchcodec", ("no_such_module.decoders", "do this"))
    assert obstacle("torchcodec") == "not installed; do this"
    obstacle.cache_clear()

    def broken(name: str) -> types.ModuleType:
        raise RuntimeError("Could not load libtorchcodec.\nLikely causes: no FFmpeg")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert obstacle("torchcodec") == "does not import: RuntimeError: Could not load libtorchcodec.; do this"


class FakeDecoder:
    """A fake of torchcodec's decoder: five frames, of which the fourth cannot be decoded."""

    def __init__(self, path: str, *, dimension_order: str, num_ffmpeg_threads: int, seek_mode: str) -> None:
        assert (dimension_order, num_ffmpeg_threads, seek_mode) == ("NHWC", 1, "exact")
        if "bad" in path:
            raise ValueError("The best video stream is unknown and there is no specified stream.")

    def __len__(self) -> int:
        return 5

    def get_frames_at(self, indices: list[int]) -> types.SimpleNamespace:
        if 3 in indices:
            raise RuntimeError("decode_frame, /src/_core/Decoder.cpp:41, Could not push packet")
        frames = np.stack([np.full((2, 4, 3), index, dtype=np.uint8) for index in indices])
        return types.SimpleNamespace(data=types.SimpleNamespace(numpy=lambda: frames))


def test_torchcodec_reader_asks_and_answers_as_promised(
    fresh_choice: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = types.ModuleType("torchcodec.decoders")
    fake.VideoDecoder = FakeDecoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", fake)
    monkeypatch.delitem(sys.modules, "everest_ds.data.readers.torchcodec", raising=False)
    for name, frames in (("good.mp4", 5), ("bad.mp4", 5), ("longer.mp4", 6)):
        write_ramp(tmp_path / name, frames)
    video = Video(tmp_path / "good.mp4", reader="torchcodec")
    assert video.num_frames == 5
    assert video.read([4, 1, 1])[:, 0, 0, 0].tolist() == [4, 1, 1]
    with pytest.raises(VideoReadError) as caught:
        video.read([3])
    assert caught.value.reason == "Could not push packet"
    with pytest.raises(VideoReadError, match="it has no video stream"):
        Video(tmp_path / "bad.mp4", reader="torchcodec")
    with pytest.raises(
        VideoReadError, match=r"counts 5 frames, its packets have times for 6; use --data\.reader pyav"
    ):
        Video(tmp_path / "longer.mp4", reader="torchcodec")
    monkeypatch.delitem(sys.modules, "everest_ds.data.readers.torchcodec")


def test_fault_goes_from_process_to_process_and_reasons_are_one_clean_line() -> None:
    fault = pickle.loads(pickle.dumps(VideoReadError(Path("a b.mp4"), "torn")))
    assert (fault.path, fault.reason, str(fault)) == (Path("a b.mp4"), "torn", "a b.mp4: torn")
    decord_says = "[12:00:01] /src/a.cc:29: [12:00:01] /src/b.cc:31: Check failed: ret >= 0\n\nStack trace"
    assert first_line(RuntimeError(decord_says)) == "Check failed: ret >= 0"
    assert first_line(RuntimeError()) == "RuntimeError"
