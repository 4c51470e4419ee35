"""Every reader on the real clips: the good ones are alike, the bad ones have the outcome written here."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from everest_ds.data.readers.choice import READERS, obstacle
from everest_ds.data.video import Video
from tests.conftest import REPOSITORY

# All readers hand out the same bytes (measured: 0 of 255), but for frames of odd width and height, which they
# convert differently: measured mean 0.68 of 255 for PyAV, 0.51 for torchcodec.
PIXEL_MEAN_ERROR = {"derived__odd_341x255_mpeg4.avi": 1.0}
# AVI with packed B-frames: decord counts the empty packet at the end as a frame.
ONE_MORE_IN_DECORD = 3
# Seconds for one reader to read all bad files; measured 10 to 20.
ALL_BAD_S = 300

OPENS_NOT = ("Error reading", "Invalid data found", "Could not open input file")
BREAKS = ("avcodec_send_packet", "Invalid data found when processing input (in decoding)", "Could not push packet")
CUT_SHORT = (
    "av_read_frame failed",
    "Invalid data found when processing input (in decoding)",
    "Could not push packet",
)
NO_VIDEO = ("cannot find video stream", "it has no video stream", "it has no video stream")
NO_LENGTH = "Failed to measure duration"
AVI_B_FRAMES = "misplaces frames of AVI"
EMPTY = "the file is empty"

# How many frames each reader finds and can decode, all of them, or part of the reason why it cannot: decord, PyAV,
# torchcodec. One entry stands for all three.
BAD_FILES: dict[str, int | str | tuple[int | str, int | str, int | str]] = {
    "zero_byte.mp4": EMPTY,
    "text.mp4": OPENS_NOT,
    "html_404.mp4": OPENS_NOT,
    "trunc_moovend_50pct.mp4": OPENS_NOT,
    "audio_only.mp4": NO_VIDEO,
    "audio_only_real.mp4": NO_VIDEO,
    "trunc_faststart_99pct.mp4": CUT_SHORT,
    "trunc_faststart_60pct.mp4": CUT_SHORT,
    "trunc_faststart_10pct.mp4": CUT_SHORT,
    "flip2000_mid.mp4": BREAKS,
    "zeros_35_60pct.mp4": BREAKS,
    "real_decord_corrupted.mp4": BREAKS,
    "editlist_cut.mp4": 114,
    "trunc_half.mkv": 150,
    "trunc_half.webm": 113,
    "single_frame.mp4": 1,
    "moov_erased.mp4": 280,
    "ok_faststart.mp4": 280,
    "ok_moovend.mp4": 280,
    "flip20_mid.mp4": 280,
    # Where the readers differ.
    "real_av1.mkv": ("data.reader=pyav reads AV1", 125, 125),
    "real_no_duration.webm": (NO_LENGTH, 74, 74),
    "png_renamed.mp4": (NO_LENGTH, 1, 1),
    "real_1x1.mp4": ("data.reader=pyav reads them", 5, 5),
    "trunc_half.avi": (77, 77, AVI_B_FRAMES),
    # decord fills up the frames that it cannot decode with the last one that it could.
    "flip200.avi": (164, 149, AVI_B_FRAMES),
    "start_not_key.ts": (187, 170, "no more frames left"),
    # decord scales what follows to the size of the first frame.
    "reschange.ts": (112, "its frames change from 340x256 to 640x480", "Expected pre-allocated tensor"),
}


def require(reader: str) -> None:
    fault = obstacle(reader)  # type: ignore[arg-type]
    if fault:
        pytest.skip(f"{reader} {fault}")


@pytest.mark.parametrize("reader", READERS)
def test_bad_files_have_their_documented_outcome_and_none_hangs_or_ends_the_process(
    reader: str, real_clips: Path
) -> None:
    require(reader)
    files = sorted(path for path in (real_clips / "bad").iterdir() if path.suffix != ".csv")
    assert {path.name for path in files} == set(BAD_FILES)
    command = [sys.executable, "-m", "tests.unit.read_all", reader, *map(str, files)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=ALL_BAD_S, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(found) == set(BAD_FILES)
    for name, expected in BAD_FILES.items():
        if isinstance(expected, tuple):
            expected = expected[list(READERS).index(reader)]  # type: ignore[call-overload]
        if isinstance(expected, int):
            assert found[name].get("frames") == expected, found[name]
        else:
            assert expected in found[name].get("reason", ""), found[name]


@pytest.mark.parametrize("reader", [name for name in READERS if name != "decord"])
def test_good_clips_are_alike_in_every_reader(reader: str, real_clips: Path) -> None:
    require(reader)
    require("decord")
    with (real_clips / "manifest.csv").open() as file:
        names = [row["file"] for row in csv.DictReader(file)]
    assert len(names) == 46
    packed = 0
    for name in names:
        path = real_clips / name
        if reader == "torchcodec" and (name.startswith("HMDB51") or name == "mmaction2__test.avi"):
            continue  # AVI with B-frames, which it refuses
        theirs, ours = Video(path, reader="decord"), Video(path, reader=reader)  # type: ignore[arg-type]
        if name.startswith("HMDB51"):
            assert ours.num_frames == theirs.num_frames - 1, name
            packed += 1
        else:
            assert ours.num_frames == theirs.num_frames, name
        # In ascending order from the beginning: decord's own seeks may miss by some frames.
        frame_idx = list(range(min(ours.num_frames, 12)))
        expected, got = theirs.read(frame_idx), ours.read(frame_idx)
        assert expected.shape == got.shape, name
        error = np.abs(expected.astype(int) - got.astype(int)).reshape(len(got), -1).mean(axis=1).max()
        assert error <= PIXEL_MEAN_ERROR.get(name, 0.0), (name, error)
    assert packed == (ONE_MORE_IN_DECORD if reader == "pyav" else 0)


@pytest.mark.parametrize("reader", READERS)
def test_window_of_an_edit_list_counts_from_its_first_frame_that_is_shown(reader: str, real_clips: Path) -> None:
    """The cut is 3.3 s into the original at 28 frames a second: frame 0 of the one is frame 93 of the other."""
    require(reader)
    cut = Video(real_clips / "bad" / "editlist_cut.mp4", reader=reader, start_s=1.0, end_s=2.0)  # type: ignore[arg-type]
    whole = Video(real_clips / "mmaction2__demo.mp4", reader=reader)  # type: ignore[arg-type]
    assert cut.num_frames == 28
    assert np.array_equal(cut.read([0, 27]), whole.read([93 + 28, 93 + 55]))
