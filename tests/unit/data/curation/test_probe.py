"""Kinds of faulty videos: files made by the tests, and the real broken files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from everest_ds.data.curation.probe import Finding, Kind, ProbeSettings, open_record, probe_video, record_line
from everest_ds.data.demo import encode_h264
from everest_ds.data.lists.video_list import VideoRow

# Kinds of the real files. flip20_mid has one damaged picture that no header or decoder reports.
GIVEN = {
    Kind.GOOD: {"ok_faststart.mp4", "ok_moovend.mp4", "moov_erased.mp4", "single_frame.mp4"}
    | {"flip20_mid.mp4", "real_av1.mkv", "real_no_duration.webm", "png_renamed.mp4", "real_1x1.mp4", "flip200.avi"},
    Kind.EDIT_LIST: {"editlist_cut.mp4"},
    Kind.STARTS_LATE: {"start_not_key.ts"},
    Kind.TRUNCATED: {"trunc_half.avi", "trunc_half.mkv", "trunc_half.webm"},
}


def probe(path: Path, **settings: int) -> Finding:
    return probe_video(VideoRow(path, 0), ProbeSettings(**settings))


def moving_video(path: Path, num_frames: int = 20) -> Path:
    levels = np.arange(num_frames) * 10
    frames = np.broadcast_to(levels[:, None, None, None], (num_frames, 64, 96, 3)).astype(np.uint8)
    encode_h264(path, frames)
    return path


def test_every_given_broken_file_is_what_it_is(real_clips: Path) -> None:
    found: dict[Kind, set[str]] = {}
    for path in sorted((real_clips / "bad").iterdir()):
        if path.suffix != ".csv":
            finding = probe(path)
            found.setdefault(finding.kind, set()).add(path.name)
            assert bool(finding.detail) == (finding.kind is not Kind.GOOD)
    unreadable = found.pop(Kind.UNREADABLE)
    assert found == GIVEN
    assert len(unreadable) == 28 - sum(len(names) for names in GIVEN.values())


def test_given_good_files_are_good(real_clips: Path) -> None:
    kinds = {path.name: probe(path).kind for path in real_clips.iterdir() if path.suffix not in (".csv", ".md", "")}
    odd = {name: kind for name, kind in kinds.items() if kind is not Kind.GOOD}
    assert odd == {"decord__unordered.mov": Kind.DUPLICATE_FRAMES}  # four frames show one picture
    assert len(kinds) == 46


def test_good_video_tells_its_size(tmp_path: Path) -> None:
    finding = probe(moving_video(tmp_path / "a.mp4"), min_frames=20)
    assert finding == Finding(kind=Kind.GOOD, frames=20, width=96, height=64)
    assert probe(tmp_path / "a.mp4", min_frames=21) == Finding(
        kind=Kind.TOO_SHORT, detail="20 frames, a clip needs 21", frames=20, width=96, height=64
    )


def test_video_that_stands_still_at_its_end_has_duplicate_frames(tmp_path: Path) -> None:
    frames = np.zeros((30, 64, 96, 3), dtype=np.uint8)
    frames[:10] = (np.arange(10) * 20)[:, None, None, None]
    encode_h264(tmp_path / "still.mp4", frames)
    assert probe(tmp_path / "still.mp4").kind is Kind.DUPLICATE_FRAMES


def test_missing_empty_and_odd_files(tmp_path: Path) -> None:
    assert probe(tmp_path / "gone.mp4") == Finding(kind=Kind.MISSING, detail="no such file")
    (tmp_path / "empty.mp4").touch()
    assert probe(tmp_path / "empty.mp4").detail == "the file is empty"
    os.mkfifo(tmp_path / "pipe.mp4")
    assert probe(tmp_path / "pipe.mp4").kind is Kind.UNREADABLE
    (tmp_path / "folder.mp4").mkdir()
    assert probe(tmp_path / "folder.mp4").detail == "it is a folder, perhaps of frames; only video files are read"
    assert probe(tmp_path / ("a" * 300)).kind is Kind.UNREADABLE


def test_known_findings_hold_but_those_of_cut_off_and_missing_files(tmp_path: Path) -> None:
    found = {
        "good.mp4": Kind.GOOD,
        "cut.mp4": Kind.TRUNCATED,
        "short.mp4": Kind.TOO_SHORT,
        "gone.mp4": Kind.MISSING,
    }
    record = open_record(tmp_path / "findings.jsonl", ProbeSettings())
    for name, kind in found.items():
        if kind is not Kind.MISSING:
            (tmp_path / name).write_bytes(b"video")
        record.append(record_line(VideoRow(tmp_path / name, 0), Finding(kind=kind)))
    known = {part[0].name: finding.kind for part, finding in record.read().items()}
    assert known == {"good.mp4": Kind.GOOD, "short.mp4": Kind.TOO_SHORT}
