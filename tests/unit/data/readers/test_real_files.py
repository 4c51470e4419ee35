"""Every reader on the real clips: good ones give the right frames, bad ones the outcomes listed here."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from everest_ds.data.readers.choice import READERS, obstacle
from everest_ds.data.readers.video import Video, VideoReadError
from tests.conftest import REPOSITORY

# Frames of accepted clips are bitwise identical to PyAV's, except that readers convert frames of odd width and
# height differently: measured mean difference 0.68 of 255.
PIXEL_MEAN_ERROR = {"derived__odd_341x255_mpeg4.avi": 1.0}
# Good clips that decord and torchcodec refuse, and the beginning of the reason.
AVI_B_FRAMES = "its times may be decoding times"
OPEN_GOP = "its frames refer to frames beyond a keyframe"
REFUSED_BY_BOTH = {
    "HMDB51__6arrowswithin30seconds_shoot_bow_f_nm_np1_fr_med_3.avi",
    "HMDB51__AdvancedBoxingTechniquesandExercises_punch_u_nm_np1_ba_med_23.avi",
    "HMDB51__HQ_Rock_Climbing_-_Free_Solo_Speed_Climb_-_Dan_Osman_climb_f_cm_np1_le_med_2.avi",
    "mmaction2__test.avi",
}
REFUSED = {
    "decord": dict.fromkeys(REFUSED_BY_BOTH, AVI_B_FRAMES) | {"torchcodec__h265_video.mp4": OPEN_GOP},
    "torchcodec": dict.fromkeys(REFUSED_BY_BOTH, AVI_B_FRAMES),
}
# Time limit for one reader to read all bad files; measured 10 to 20 s.
ALL_BAD_S = 300

OPENS_NOT = "Invalid data found"
BREAKS = ("Invalid data found when processing input (in decoding)", "avcodec_send_packet", "Could not push packet")
DAMAGED = "some of its packets are damaged"
CUT_SHORT = ("Invalid data found when processing input (in decoding)", DAMAGED, DAMAGED)
NO_VIDEO = "it has no video stream"
NO_LENGTH = "decord finds no duration in the file; use --data.reader pyav"
LATE_START = "it does not begin with a keyframe"
EMPTY = "the file is empty"

# For PyAV, decord and torchcodec: the number of frames, all of which can be decoded, or part of the reason for a
# refusal. A single entry is valid for all three.
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
    "trunc_half.mkv": 150,
    "trunc_half.webm": 113,
    "single_frame.mp4": 1,
    "moov_erased.mp4": 280,
    "ok_faststart.mp4": 280,
    "ok_moovend.mp4": 280,
    "flip20_mid.mp4": 280,
    # Files on which the readers differ.
    "editlist_cut.mp4": (114, "an edit list hides some of its frames", 114),
    "real_av1.mkv": (125, "av1 in matroska", 125),
    "real_no_duration.webm": (74, NO_LENGTH, 74),
    "png_renamed.mp4": (1, "png in png_pipe", "png in png_pipe"),
    "real_1x1.mp4": (5, "this width; use --data.reader pyav", 5),
    "trunc_half.avi": (77, AVI_B_FRAMES, AVI_B_FRAMES),
    "flip200.avi": (149, AVI_B_FRAMES, AVI_B_FRAMES),
    "start_not_key.ts": (170, LATE_START, LATE_START),
    "reschange.ts": (
        "its frames change from 340x256 to 640x480",
        "its packets do not say",
        "its packets do not say",
    ),
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
    command = [sys.executable, "-m", "tests.unit.data.readers.read_all", reader, *map(str, files)]
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


@pytest.mark.parametrize("reader", ["decord", "torchcodec"])
def test_good_clips_are_those_of_pyav_or_refused(reader: str, real_clips: Path) -> None:
    require(reader)
    with (real_clips / "manifest.csv").open() as file:
        names = [row["file"] for row in csv.DictReader(file)]
    assert len(names) == 46
    for name in names:
        path = real_clips / name
        if name in REFUSED[reader]:
            with pytest.raises(VideoReadError, match=f"{REFUSED[reader][name]}.*use --data.reader pyav"):
                Video(path, reader=reader)  # type: ignore[arg-type]
            continue
        theirs, ours = Video(path, reader=reader), Video(path, reader="pyav")  # type: ignore[arg-type]
        assert theirs.num_frames == ours.num_frames, name
        draw = random.Random(name)
        frame_idx = [draw.randrange(ours.num_frames) for _ in range(3)]
        expected, got = ours.read(frame_idx), theirs.read(frame_idx)
        assert expected.shape == got.shape, name
        error = np.abs(expected.astype(int) - got.astype(int)).reshape(len(got), -1).mean(axis=1).max()
        assert error <= PIXEL_MEAN_ERROR.get(name, 0.0), (name, error)


def digests(path: Path) -> list[str]:
    """Return the MD5 sums of all frames that plain PyAV decodes from the beginning."""
    convert = VideoReformatter()
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            pixels = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
            found.append(hashlib.md5(np.rot90(pixels, round(frame.rotation / 90)).tobytes()).hexdigest())
    return found


TRICKY = ("bframes.avi", "editlist_cut.mp4", "gop12.wmv", "gop25.ts", "longaudio.webm", "no_duration.webm",
          "opengop_h264.mp4", "vfr.mp4")  # fmt: skip
AWKWARD = ("editlist_cut.mp4", "flip20_mid.mp4", "flip200.avi", "trunc_half.avi", "trunc_half.mkv", "real_av1.mkv",
           "real_no_duration.webm", "start_not_key.ts")  # fmt: skip


@pytest.mark.parametrize("name", [f"tricky/{name}" for name in TRICKY] + [f"bad/{name}" for name in AWKWARD])
def test_sparse_reads_of_awkward_and_damaged_files_are_those_of_a_whole_decode(name: str, real_clips: Path) -> None:
    expected = digests(real_clips / name)
    video = Video(real_clips / name, reader="pyav")
    assert video.num_frames == len(expected)
    draw = random.Random(name)
    for wanted in (draw.sample(range(len(expected)), 6), [len(expected) * 2 // 3], [len(expected) - 1, 0]):
        frames = video.read(wanted)
        assert [hashlib.md5(frame.tobytes()).hexdigest() for frame in frames] == [expected[i] for i in wanted]


@pytest.mark.parametrize("reader", READERS)
def test_window_of_an_edit_list_counts_from_its_first_frame_that_is_shown(reader: str, real_clips: Path) -> None:
    """The copy starts 3.3 s into the original of 28 frames/s, so its frame 0 is the original's frame 93."""
    require(reader)
    if reader == "decord":
        pytest.skip("decord refuses files with an edit list that hides frames")
    cut = Video(real_clips / "bad" / "editlist_cut.mp4", reader=reader, start_s=1.0, end_s=2.0)  # type: ignore[arg-type]
    whole = Video(real_clips / "mmaction2__demo.mp4", reader=reader)  # type: ignore[arg-type]
    assert cut.num_frames == 28
    assert np.array_equal(cut.read([0, 27]), whole.read([93 + 28, 93 + 55]))
