from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from everest_ds.data.demo import encode_h264
from everest_ds.data.readers.video import Video, VideoReadError

# Mean error of H.264 at crf 16 on the ramp below; measured 1.0 of 255 in the worst frame.
CODEC_MEAN_ERROR = 4.0


def ramp_video(path: Path, num_frames: int = 20) -> np.ndarray:
    """A video whose grey levels encode the frame number."""
    levels = np.arange(num_frames) * 10
    frames = np.broadcast_to(levels[:, None, None, None], (num_frames, 64, 96, 3)).astype(np.uint8)
    encode_h264(path, frames)
    return frames


def test_read_returns_the_frames_asked_for_in_that_order(tmp_path: Path) -> None:
    frames = ramp_video(tmp_path / "ramp.mp4")
    video = Video(tmp_path / "ramp.mp4")
    assert video.num_frames == 20
    wanted = [3, 19, 0, 7, 7]
    read = video.read(wanted)
    assert read.dtype == np.uint8
    assert read.shape == (5, 64, 96, 3)
    error = np.abs(read.astype(int) - frames[wanted].astype(int)).reshape(5, -1).mean(axis=1)
    assert error.max() < CODEC_MEAN_ERROR


def test_index_beyond_the_end_is_refused(tmp_path: Path) -> None:
    ramp_video(tmp_path / "ramp.mp4")
    with pytest.raises(IndexError, match="has 20 frames"):
        Video(tmp_path / "ramp.mp4").read([20])


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "no such file"), (b"", "the file is empty"), (b"text\n" * 99, "")]
)
def test_unreadable_file_says_path_and_reason(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoReadError) as caught:
        Video(path)
    assert caught.value.path == path
    assert caught.value.reason
    assert reason in caught.value.reason
    assert "\n" not in caught.value.reason


def test_fault_of_the_file_system_is_a_bad_video_too(tmp_path: Path) -> None:
    with pytest.raises(VideoReadError, match="File name too long"):
        Video(tmp_path / ("a" * 300))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(VideoReadError):
        Video(tmp_path / "folder.mp4")


def test_every_good_real_clip_is_read(real_clips: Path) -> None:
    with (real_clips / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 46
    for row in rows:
        video = Video(real_clips / row["file"])
        # AVI with packed B-frames: decord counts the empty last packet as a frame.
        counted_too_many = row["file"].startswith("HMDB51")
        assert video.num_frames == int(row["frames_decord"]) - counted_too_many, row["file"]
        frames = video.read([0, video.num_frames - 1])
        assert f"{frames.shape[1]}x{frames.shape[2]}" == row["decord_shape"], row["file"]


def test_frames_of_an_edit_list_are_no_copies_of_the_last_one(real_clips: Path) -> None:
    video = Video(real_clips / "bad" / "editlist_cut.mp4")
    frames = video.read(range(video.num_frames)).astype(int)
    changes = np.abs(frames[1:] - frames[:-1]).reshape(video.num_frames - 1, -1).max(axis=1)
    assert changes.min() > 0
