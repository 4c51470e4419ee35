"""`everest prepare`: writes new videos and lists, only reads the originals, and continues when called again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from everest_ds import cli
from everest_ds.data.curation import reencode
from everest_ds.data.curation.preparation import (
    Prepared,
    PrepareOptions,
    PrepareSettings,
    start_preparation,
    target_name,
)
from everest_ds.data.curation.reencode import prepare_video
from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.data.loading.pool import Outcome
from everest_ds.data.readers.video import Video
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import partial_path
from tests.unit.data.readers.video_files import shown, write_ramp

LABELS = [0, 2, 1, 2, 0]
# Seconds until a command that was just started has prepared its first videos; measured 8.
STARTS_S = 120


def misbehave_or_prepare(row: VideoRow, settings: PrepareSettings, folder: Path, min_psnr_db: float) -> Prepared:
    """A decoder that hangs on one video, and on another ends its process with a partial file."""
    if row.path.name in ("hangs.mp4", "crashes.mp4"):
        target = folder / target_name(row)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial_path(target).write_bytes(b"half")
        if row.path.name == "crashes.mp4":
            os._exit(9)
        time.sleep(600)
    return prepare_video(row, settings, folder, min_psnr_db)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the calls in this process, for speed, and list the videos that they were for."""
    called: list[str] = []

    def run(
        function: Callable[[VideoRow], Prepared], items: Sequence[VideoRow], *, num_workers: int, timeout_s: float
    ) -> Iterator[Outcome[VideoRow, Prepared]]:
        for item in items:
            called.append(item.path.name)
            yield Outcome(item, function(item))

    monkeypatch.setattr(reencode, "run_all", run)
    return called


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five videos of three classes, one of them listed twice, and two windows of another."""
    folder = tmp_path / "my videos"
    folder.mkdir()
    for number in range(5):
        write_ramp(folder / f"{number}.mp4", 20 + number)
    lines = [f'"my videos/{number}.mp4" {label}' for number, label in enumerate(LABELS)]
    lines[2:2] = ['"my videos/1.mp4" 2', '"my videos/4.mp4" 1 0.5 1.0', '"my videos/4.mp4" 0 1.0 2.0']
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "val.csv").write_text('"my videos/3.mp4" 2\n"my videos/0.mp4" 0\n')
    (tmp_path / "classes.txt").write_text("running\njumping\nsitting\n")
    return tmp_path / "train.csv"


def options(tmp_path: Path, **changes: Any) -> PrepareOptions:
    return replace(PrepareOptions(out=tmp_path / "out", processes=1), **changes)


def prepare(sources: Sequence[Path], given: PrepareOptions) -> int:
    return reencode.run(start_preparation(sources, given), World(rank=0, local_rank=0, size=1, local_size=1))


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and modification time of all files."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()[1:]]


def test_lists_name_the_same_videos_anew_and_originals_stay(
    source: Path, tmp_path: Path, at_once: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(tmp_path)
    assert prepare([source], options(tmp_path)) == 0
    assert {name: now for name, now in state(tmp_path).items() if "/out/" not in name} == before
    old, new = read_list(source), read_list(tmp_path / "out" / "train.csv")
    assert [row.label for row in new] == [row.label for row in old]
    assert all(row.start_s is None and row.end_s is None for row in new)
    for before_row, row in zip(old, new, strict=True):
        expected = Video.of_row(before_row, "pyav")
        video = Video.of_row(row, "auto")
        assert video.num_frames == expected.num_frames
        every = range(video.num_frames)
        assert shown(video.read(every)) == shown(expected.read(every))
    assert new[1].path == new[2].path  # the row that is listed twice
    assert len({row.path for row in new}) == 7
    assert len(at_once) == 7
    assert (tmp_path / "out" / "classes.txt").read_bytes() == (tmp_path / "classes.txt").read_bytes()
    said = capsys.readouterr().out
    assert "7 videos, 125 frames" in said
    assert "0 of 8 rows left out" in said
    assert "lost: sound" in said


def test_summary_and_manifest_hold_what_is_on_disk(source: Path, tmp_path: Path, at_once: list[str]) -> None:
    prepare([source], options(tmp_path))
    out = tmp_path / "out"
    lines = manifest(out)
    for line in lines:
        assert (out / line["target"]).stat().st_size == line["bytes_after"]
        assert Path(line["source"]).stat().st_size == line["bytes_before"]
        assert line["fault"] is None
        assert line["psnr_db"] > 30
    account = json.loads((out / "summary.json").read_text())["lists"]["train.csv"]
    assert account["frames"] == sum(line["frames_out"] for line in lines) == 20 + 21 + 22 + 23 + 24 + 5 + 10
    assert account["bytes_before"] == sum(path.stat().st_size for path in (tmp_path / "my videos").iterdir())
    assert account["bytes_after"] == sum(path.stat().st_size for path in (out / "videos").rglob("*.mp4"))
    assert account["growth"] == pytest.approx(account["bytes_after"] / account["bytes_before"], abs=1e-3)
    assert not list(out.rglob("*.partial"))


def test_second_call_does_what_is_missing_or_has_changed(
    source: Path, tmp_path: Path, at_once: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare([source], options(tmp_path))
    out = tmp_path / "out"
    before = state(out / "videos")
    at_once.clear()
    assert prepare([source], options(tmp_path)) == 0
    assert at_once == []
    assert state(out / "videos") == before
    assert "7 of 7 videos are prepared already" in capsys.readouterr().out

    new = read_list(out / "train.csv")
    new[0].path.unlink()
    new[1].path.write_bytes(b"torn")
    write_ramp(tmp_path / "my videos" / "2.mp4", 11)
    (out / "train.csv").unlink()
    assert prepare([source], options(tmp_path)) == 0
    assert at_once == ["0.mp4", "1.mp4", "2.mp4"]
    assert [Video(row.path).num_frames for row in read_list(out / "train.csv")] == [20, 21, 21, 5, 10, 11, 23, 24]

    at_once.clear()  # the earlier result may no longer be good enough
    assert prepare([source], options(tmp_path, min_psnr=60.0)) == 1
    assert len(at_once) == 7
    assert all(" dB, --min-psnr is 60 dB" in line["fault"] for line in manifest(out)[-7:])


def test_originals_may_go_when_their_copies_are_there(source: Path, tmp_path: Path, at_once: list[str]) -> None:
    prepare([source], options(tmp_path))
    shutil.rmtree(tmp_path / "my videos")
    at_once.clear()
    assert prepare([source], options(tmp_path)) == 0
    assert at_once == []
    assert len(read_list(tmp_path / "out" / "train.csv")) == 8


def test_train_and_val_share_a_folder_and_its_files(source: Path, tmp_path: Path, at_once: list[str]) -> None:
    prepare([source], options(tmp_path))
    assert prepare([tmp_path / "val.csv"], options(tmp_path)) == 0
    assert len(at_once) == 7  # both videos of val.csv were there
    train, val = (read_list(tmp_path / "out" / name) for name in ("train.csv", "val.csv"))
    assert [(row.path, row.label) for row in val] == [(train[6].path, 2), (train[0].path, 0)]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["lists"]) == ["train.csv", "val.csv"]

    both = options(tmp_path, out=tmp_path / "at once")
    assert prepare([source, tmp_path / "val.csv"], both) == 0
    assert (
        json.loads((tmp_path / "at once" / "summary.json").read_text())["lists"].keys() == summary["lists"].keys()
    )


def test_fewer_frames_say_what_is_lost(
    source: Path, tmp_path: Path, at_once: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare([source], options(tmp_path, keep_every=2)) == 0
    lost = json.loads((tmp_path / "out" / "summary.json").read_text())["lost"]
    assert "data.sampling_stride=4 must read these videos with data.sampling_stride=2" in lost
    assert "of 4 neighbouring starts of a clip 2 starts are left" in lost
    assert lost in capsys.readouterr().out
    assert reencode.describe_loss(4, 4).endswith("starts of a clip 1 start is left")
    first = Video(read_list(tmp_path / "out" / "train.csv")[0].path)
    assert shown(first.read(range(first.num_frames))) == list(range(0, 20, 2))


def test_faults_are_left_out_named_and_tried_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In real processes: one video hangs, one ends its process, one is not a video, one is missing."""
    monkeypatch.setattr(reencode, "prepare_video", misbehave_or_prepare)
    good = tmp_path / "my videos" / "0.mp4"
    for name in ("hangs.mp4", "crashes.mp4"):
        shutil.copy(good, tmp_path / name)
    (tmp_path / "text.mp4").write_text("no video")
    rows = [
        "hangs.mp4 0",
        '"my videos/0.mp4" 1',
        "crashes.mp4 0",
        "text.mp4 2",
        "gone.mp4 0",
        '"my videos/1.mp4" 2',
    ]
    (tmp_path / "mixed.csv").write_text("\n".join(rows) + "\n")
    given = options(tmp_path, processes=2, timeout_s=6.0)
    assert prepare([tmp_path / "mixed.csv"], given) == 1
    out = tmp_path / "out"
    assert [row.label for row in read_list(out / "mixed.csv")] == [1, 2]
    assert not list(out.rglob("*.partial"))
    said = capsys.readouterr().out
    faults = {Path(line["source"]).name: line["fault"] for line in manifest(out) if line["fault"]}
    assert faults["hangs.mp4"] == "no answer within 6 s"
    assert faults["crashes.mp4"] == "it ended its process (exit code 9)"
    assert faults["gone.mp4"] == "no such file"
    assert "Invalid data found" in faults["text.mp4"]
    assert all(f"{name}: {fault}" in said for name, fault in faults.items())
    assert "66.67% of the rows are left out, more than --max-bad-share 1.00%" in said

    shutil.copy(good, tmp_path / "text.mp4")
    monkeypatch.setattr(reencode, "prepare_video", prepare_video)
    assert prepare([tmp_path / "mixed.csv"], replace(given, max_bad_share=0.2)) == 0
    assert [row.label for row in read_list(out / "mixed.csv")] == [0, 1, 0, 2, 2]
    assert "2 of 6 videos are prepared already" in capsys.readouterr().out


def test_list_of_faults_alone_is_empty(tmp_path: Path, at_once: list[str]) -> None:
    (tmp_path / "gone.csv").write_text("gone.mp4 0\n")
    assert prepare([tmp_path / "gone.csv"], options(tmp_path)) == 1
    assert (tmp_path / "out" / "gone.csv").read_text() == ""


def test_call_that_was_killed_goes_on(tmp_path: Path) -> None:
    for number in range(12):
        write_ramp(tmp_path / f"{number}.mp4", 40)
    (tmp_path / "train.csv").write_text("".join(f"{number}.mp4 {number % 3}\n" for number in range(12)))
    out = tmp_path / "out"
    words = [sys.executable, "-m", "everest_ds", "prepare", str(tmp_path / "train.csv"), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    first = subprocess.Popen([*words, "--processes", "1"], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + STARTS_S
        while not (out / "manifest.jsonl").is_file() or len(manifest_whole(out)) < 3:
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.005)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    known = len(manifest_whole(out))
    assert 3 <= known < 12
    assert not (out / "train.csv").exists()
    with (out / "manifest.jsonl").open("a") as file:
        file.write('{"source": "/cut sh')
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=STARTS_S)
    assert done.returncode == 0, done.stderr
    assert f"{known} of 12 videos are prepared already" in done.stdout
    rows = read_list(out / "train.csv")
    assert [row.label for row in rows] == [number % 3 for number in range(12)]
    assert all(Video(row.path).num_frames == 40 for row in rows)
    assert len(manifest(out)) == 12


def manifest_whole(out: Path) -> list[str]:
    return [line for line in (out / "manifest.jsonl").read_text().splitlines(keepends=True)[1:] if "\n" in line]


def test_other_settings_names_and_classes_are_refused_and_change_nothing(
    source: Path, tmp_path: Path, at_once: list[str]
) -> None:
    prepare([source], options(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(source, other / "train.csv")
    shutil.copy(source, other / "more.csv")
    (other / "classes.txt").write_text("walking\njumping\nsitting\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train.csv").write_text("mine 0\n")
    shutil.copy(source, tmp_path / "summary.json")
    before = state(tmp_path)
    for sources, changes, message in (
        ([source], {"quality": 6}, r"contains a preparation with .*'quality': 5.*name another folder"),
        ([source], {"keep_every": 2}, "'keep_every': 1"),
        ([source], {"codec": "h264"}, "'codec': 'mjpeg'"),
        ([source, other / "train.csv"], {}, "two lists are called train.csv"),
        ([other / "train.csv"], {}, r"out/train.csv belongs to .*/train.csv; rename"),
        ([other / "more.csv"], {}, "classes.txt and .*classes.txt differ"),
        ([source], {"out": tmp_path / "foreign"}, r"foreign/train.csv was not written by `everest prepare`"),
        ([source], {"out": tmp_path}, r"was not written by `everest prepare`"),
        ([tmp_path / "summary.json"], {}, "a list cannot be called summary.json"),
        ([tmp_path / "absent.csv"], {}, "absent.csv"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(sources, options(tmp_path, **changes))
        assert state(tmp_path) == before, message


def test_disk_without_room_ends_the_call_and_a_later_one_goes_on(
    source: Path,
    tmp_path: Path,
    at_once: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(reencode, "_FILES_TO_ESTIMATE_BY", 2)
    monkeypatch.setattr(reencode.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match=r"the remaining videos need about .*free some space and repeat"):
        prepare([source], options(tmp_path))
    assert len(at_once) == 2
    monkeypatch.setattr(reencode.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(reencode, "prepare_video", lambda row, **given: Prepared(fault="full", is_disk_full=True))
    words = ["prepare", str(source), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(reencode, "prepare_video", prepare_video)
    assert cli.main(words) == 0
    assert "2 of 7 videos are prepared already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--keep-every", "3"], "--keep-every 3 does not divide --sampling-stride 4"),
        (["--keep-every", "0"], "--keep-every 0 must be at least 1"),
        (["--short-side", "255"], "--short-side 255 must be even"),
        (["--gop", "12"], "--gop 12 has no effect with mjpeg"),
        (["--quality", "1"], "--quality 1 must be from 2 to 31 with mjpeg"),
        (["--codec", "h264", "--quality", "52"], "--quality 52 must be from 0 to 51 with h264"),
        (["--codec", "vp9"], "invalid choice 'vp9'"),
        (["--timeout-s", "0"], "--timeout-s 0.0 must be above 0"),
        (["--min-psnr", "nan"], "--min-psnr nan must be a number"),
        (["--max-bad-share", "2"], "--max-bad-share 2.0 must be a share"),
        (["--processes", "0"], "--processes 0 must be at least 1"),
    ],
)
def test_wrong_options_are_refused(
    words: list[str], named: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["prepare", str(source), "--out", str(tmp_path / "out"), *words])
    except SystemExit as stop:  # the parser's own
        code = int(stop.code or 0)
    assert code == 2
    assert named in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_command_wants_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", "--out", str(tmp_path)]) == 2
    assert "there is no list to prepare; expected `everest prepare LIST" in capsys.readouterr().err
