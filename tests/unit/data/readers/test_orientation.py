"""Frames are rotated and flipped as the file asks: the eight display matrices in all readers and containers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from everest_ds.data.readers.base import VideoReadError
from everest_ds.data.readers.choice import READERS, obstacle
from everest_ds.data.readers.orientation import orientation_of_matrix
from everest_ds.data.readers.video import Video
from tests.unit.data.readers.reader_corpus import require_ffmpeg
from tests.unit.data.readers.video_files import TURNS, corners, turned_size, write_turned, write_turned_mkv

# Error of H.264 at crf 16 on flat corners; measured 2 of 255.
CORNER_ERROR = 6
ONE = 1 << 16


@pytest.fixture(params=list(READERS))
def reader(request: pytest.FixtureRequest) -> str:
    fault = obstacle(request.param)
    if fault:
        pytest.skip(f"{request.param} {fault}")
    return str(request.param)


def copied(source: Path, name: str, *options: str) -> Path:
    """Copy a video with ffmpeg without decoding, with further options; return the copy's path."""
    require_ffmpeg()
    words = ["ffmpeg", "-v", "error", "-nostdin", "-y", "-i", str(source), "-c", "copy", *options]
    subprocess.run([*words, str(source.with_name(name))], check=True, timeout=60)
    return source.with_name(name)


def seen_by_ffmpeg(path: Path, width: int, height: int) -> np.ndarray:
    words = ["ffmpeg", "-v", "error", "-nostdin", "-i", str(path), "-frames:v", "1", "-pix_fmt", "rgb24"]
    done = subprocess.run([*words, "-f", "rawvideo", "-"], capture_output=True, check=True, timeout=60)
    return np.frombuffer(done.stdout, np.uint8).reshape(1, height, width, 3)


@pytest.mark.parametrize("extension", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("turn", TURNS)
def test_picture_is_turned_and_mirrored_as_its_file_asks(
    turn: str, extension: str, reader: str, tmp_path: Path
) -> None:
    path = tmp_path / f"turned.{extension}"
    write = write_turned_mkv if extension == "mkv" else write_turned
    write(path, turn)
    frames = Video(path, reader=reader).read([0, 2])  # type: ignore[arg-type]
    width, height = turned_size(turn)
    assert frames.shape == (2, height, width, 3)
    assert np.abs(np.array(corners(frames)) - TURNS[turn][1]).max() < CORNER_ERROR


@pytest.mark.parametrize("turn", TURNS)
def test_expected_corners_are_those_of_ffmpeg(turn: str, tmp_path: Path) -> None:
    require_ffmpeg()
    write_turned(tmp_path / "turned.mp4", turn)
    picture = seen_by_ffmpeg(tmp_path / "turned.mp4", *turned_size(turn))
    assert np.abs(np.array(corners(picture)) - TURNS[turn][1]).max() < CORNER_ERROR


@pytest.mark.parametrize("orientation", ["rotate=90", "flip=horizontal", "rotate=270:flip=vertical"])
def test_turn_that_frames_ask_for_is_applied_or_refused(orientation: str, reader: str, tmp_path: Path) -> None:
    write_turned(tmp_path / "plain.mp4", "as it is")
    option = f"h264_metadata=display_orientation=insert:{orientation}"
    path = copied(tmp_path / "plain.mp4", "turned.mp4", "-bsf:v", option)
    if reader != "pyav":
        with pytest.raises(VideoReadError, match=r"say how to rotate the picture; use --data\.reader pyav"):
            Video(path, reader=reader)  # type: ignore[arg-type]
        return
    frames = Video(path, reader=reader).read([0])  # type: ignore[arg-type]
    expected = seen_by_ffmpeg(path, frames.shape[2], frames.shape[1])
    assert np.abs(np.array(corners(frames)) - corners(expected)).max() < CORNER_ERROR
    assert np.abs(np.array(corners(frames)) - TURNS["as it is"][1]).max() > CORNER_ERROR


def test_matrix_of_no_quarter_turn_is_refused(reader: str, tmp_path: Path) -> None:
    write_turned(tmp_path / "askew.mp4", (0.7071, 0.7071, -0.7071, 0.7071))
    with pytest.raises(VideoReadError, match=r"0\.7071.* is not a multiple of a quarter turn; re-encode it"):
        Video(tmp_path / "askew.mp4", reader=reader).read([0])  # type: ignore[arg-type]


@pytest.mark.parametrize("turn", TURNS)
def test_scale_and_small_errors_of_a_matrix_do_not_count(turn: str) -> None:
    a, b, c, d = TURNS[turn][0]
    expected = orientation_of_matrix((a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30))
    found = orientation_of_matrix(
        (a * 2 * ONE + 9, b * 2 * ONE - 9, 0, c * 2 * ONE + 9, d * 2 * ONE, 0, 0, 0, 1 << 30)
    )
    assert found == expected
    assert orientation_of_matrix((0,) * 9) == orientation_of_matrix((ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30))
