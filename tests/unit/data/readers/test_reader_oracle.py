"""Every reader on every file of a generated corpus returns the right frames or refuses the file with a reason.

Two oracles: RGB frames must be bitwise identical to those of plain PyAV, which decodes the whole file. Number and
order of PyAV's frames are checked against the ffmpeg command line, by MD5 sums in the native pixel format.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import av
import numpy as np
import pytest

from everest_ds.data.readers import packets
from everest_ds.data.readers.base import VideoReadError
from everest_ds.data.readers.choice import obstacle
from everest_ds.data.readers.video import Video
from tests.unit.data.readers.reader_corpus import CELLS, decode_all, ffmpeg_digests, make_cell, require_ffmpeg

# Encodings that decord and torchcodec read, by extension. They refuse the rest of the corpus; PyAV reads all of it.
ACCEPTED = {
    "decord": {
        "mp4": "x264 x264_no_b x264_pyramid x264_one_key x264_keys x264_fragments x264_no_edits x264_negative "
        "x264_rate x264_late x264_short x264_sound x265_closed x265_closed_late x265_no_b x265_radl mpeg4 "
        "mpeg4_late vp9 vp9_hidden mjpeg",
        "mov": "x264 x264_no_b x265_closed mjpeg prores",
        "3gp": "x264 mpeg4",
        "mkv": "x264 x264_no_b x264_pyramid x264_one_key x264_offset x264_cut x265_closed x265_closed_cut "
        "x265_no_b mpeg4 mpeg4_cut vp8 vp9 vp9_cut vp9_hidden mjpeg prores ffv1",
        "webm": "vp8 vp9 vp9_hidden vp9_rate",
        "avi": "mpeg4 mpeg4_cut mpeg4_rate msmpeg4v2 msmpeg4v3 mjpeg ffv1 huffyuv",
        "flv": "x264 x264_no_b flv1",
    }
}
ACCEPTED["torchcodec"] = {
    **ACCEPTED["decord"],
    "mp4": ACCEPTED["decord"]["mp4"]
    + " x264_cut x264_cut_again x264_open x264_open_cut x264_open_late x264_open_fragments x264_open_no_edits "
    "x264_open_negative x265_open x265_open_cut x265_open_late x265_open_fragments x265_open_no_edits "
    "x265_open_negative x265_open_rate x265_closed_cut vp9_cut av1",
    "mov": ACCEPTED["decord"]["mov"] + " x264_cut x264_open x264_open_cut x265_open x265_open_cut x265_closed_cut",
    "mkv": ACCEPTED["decord"]["mkv"] + " x264_open x264_open_rate x265_open av1",
    "webm": ACCEPTED["decord"]["webm"] + " vp9_live av1",
}
# One cell of each kind; the others are slow tests.
DEFAULT = {
    "x264.mp4", "x264_open.mp4", "x264_refresh_b.mp4", "x264_cut.mp4", "x264_cut.mkv", "x264_open_cut.mkv",
    "x264_interlaced.mkv", "x264.ts", "x264.avi", "x264.asf", "x264.h264", "x264_twice.ts",
    "x264_open_begun.ts", "x264_rate.mp4", "x264_fragments.mp4", "x265_open.mkv", "x265_closed.mov",
    "x265_radl.mp4", "mpeg4.avi", "mpeg4_b.avi", "mpeg4_b.mp4", "mpeg4_cut.mov", "xvid_b.mkv", "mpeg2_b.mpg",
    "mpeg1_b.ts", "vp8_hidden.webm", "vp9_hidden.webm", "vp9_live.webm", "av1.mkv", "mjpeg.mp4", "mjpeg.avi",
    "h263p.avi", "wmv2.wmv", "theora.ogv", "gif.gif",
}  # fmt: skip
NAMES = [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in CELLS]
READERS = ("pyav", "pyav, seeking", "decord", "torchcodec")
# Pixel formats whose PyAV array has the same bytes as ffmpeg's MD5 sum.
SAME_FORMATS = ("yuv420p", "yuvj420p", "rgb24")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_ffmpeg()
    return tmp_path_factory.mktemp("corpus")


def is_accepted(reader: str, name: str) -> bool:
    kind, extension = name.split(".")
    return reader not in ACCEPTED or kind in ACCEPTED[reader].get(extension, "").split()


def sparse_reads(num_frames: int, name: str) -> list[list[int]]:
    """Return lists of frames to read: random ones in any order, forwards and backwards, and the last one."""
    draw = random.Random(name)
    places = range(num_frames)
    return [
        [num_frames - 1],
        draw.sample(places, 5),
        sorted(draw.sample(places, 4)),
        sorted(draw.sample(places, 4), reverse=True),
        *([draw.randrange(num_frames)] for _ in range(4)),
        [num_frames // 2, 0, num_frames // 2],
    ]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", NAMES)
def test_sparse_reads_are_those_of_a_whole_decode_or_the_file_is_refused(
    name: str, reader: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, _, how = reader.partition(", ")
    fault = obstacle(reader)  # type: ignore[arg-type]
    if fault:
        pytest.skip(f"{reader} {fault}")
    if how == "seeking":
        monkeypatch.setattr(packets, "_HELD_BYTES", 0)
    path = make_cell(corpus, name)
    if not is_accepted(reader, name):
        with pytest.raises(VideoReadError, match=r"use --data\.reader pyav "):
            Video(path, reader=reader)  # type: ignore[arg-type]
        return
    expected = decode_all(path)
    video = Video(path, reader=reader)  # type: ignore[arg-type]
    assert video.num_frames == len(expected)
    for number, wanted in enumerate(sparse_reads(len(expected), name)):
        if number % 3 == 2:  # alternate fresh readers and readers that have read before
            video = Video(path, reader=reader)  # type: ignore[arg-type]
        frames = video.read(wanted)
        wrong = [index for index, frame in zip(wanted, frames, strict=True) if (frame != expected[index]).any()]
        assert not wrong, f"of {wanted}"


@pytest.mark.parametrize("name", NAMES)
def test_whole_decode_has_the_frames_of_ffmpeg(name: str, corpus: Path) -> None:
    path = make_cell(corpus, name)
    expected = ffmpeg_digests(path)
    assert Video(path, reader="pyav").num_frames == len(expected)
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        frames = list(container.decode(stream))
    if frames[0].format.name in SAME_FORMATS:
        found = [hashlib.md5(frame.to_ndarray().tobytes()).hexdigest() for frame in frames]
        assert found == expected
    assert len(set(expected)) > len(expected) // 3  # frames differ, so a wrong frame is noticed
    assert np.array_equal(decode_all(path)[-1], frames[-1].to_ndarray(format="rgb24"))
