"""Files that are not videos, odd names and videos of absurd sizes are named as bad samples in every command."""

from __future__ import annotations

import csv
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from everest_ds.config import ViewsConfig
from everest_ds.config.sections import ReaderName
from everest_ds.data.clips import views as views_module
from everest_ds.data.clips.batch import MAX_REPLACEMENTS
from everest_ds.data.clips.cuts import PretrainCut
from everest_ds.data.clips.dataset import ClipDataset
from everest_ds.data.clips.sampling import SampleKey
from everest_ds.data.clips.views import ViewDataset
from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.data.readers import packets
from everest_ds.data.readers.choice import obstacle
from everest_ds.data.readers.pyav import PyavReader
from everest_ds.data.readers.video import Video, VideoReadError
from everest_ds.recipes import get_recipe
from tests.integration.launch import SMALL, compute, losses
from tests.integration.scanning import run_in_turn

IS_NO_FILE = "it is a device, a pipe or a socket; only video files are read"
# Files that are made below, and the message about each.
ODD = {
    "pipe.mp4": IS_NO_FILE,
    "zero.mp4": IS_NO_FILE,
    "socket.mp4": IS_NO_FILE,
    "folder.mp4": "it is a folder",
    "loop.mp4": "Too many levels of symbolic links",
    "empty.mp4": "the file is empty",
    "names.mp4": "Operation not permitted",  # a list of other files, which FFmpeg would open
    "subtitles.mp4": "it has no video stream",
    "huge.gif": "too large ones; data.max_pixels",
    "grows.avi": "Invalid data found",  # its header says 64 x 64, its frames but the first are 16000 x 16000
    "a" * 300 + ".mp4": "File name too long",
    "nu\0l.mp4": "no file can have this name",
    "good.mp4/in it.mp4": "Not a directory",
    "\udcff\udcfe\x1b[2J.mp4": "no such file",
}
# Odd but readable: more frames in the header than in the file, a name that is not UTF-8, an overflowing length.
SOUND = ["announces.avi", "\udcfc.mp4", "good.mp4"]


def encode(path: Path, codec: str, pix_fmt: str, width: int = 64, height: int = 64, frames: int = 24) -> bytearray:
    """Encode a video with distinct frames, and return its bytes."""
    with av.open(os.fsencode(path).decode(), "w") as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt  # type: ignore[attr-defined]
        for number in range(frames):
            image = np.full((height, width, 3), number * 9, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))  # type: ignore[attr-defined]
        file.mux(stream.encode())  # type: ignore[attr-defined]
    return bytearray(path.read_bytes())


@pytest.fixture(scope="module")
def odd_list(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A list of everything in `ODD` and `SOUND`, and of windows beyond the ends of videos."""
    folder = tmp_path_factory.mktemp("odd")
    good = encode(folder / "good.mp4", "libx264", "yuv420p")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "zero.mp4").symlink_to("/dev/zero")
    (folder / "folder.mp4").mkdir()
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "empty.mp4").touch()
    (folder / "names.mp4").write_text("ffconcat version 1.0\nfile '/etc/passwd'\n")
    (folder / "subtitles.mp4").write_text("1\n00:00:01,000 --> 00:00:02,000\nsaid\n")
    gif = encode(folder / "huge.gif", "gif", "rgb8")
    gif[6:10] = b"\xff\xff\xff\xff"
    (folder / "huge.gif").write_bytes(gif)
    avi = encode(folder / "grows.avi", "mjpeg", "yuvj420p")
    announcing = avi.copy()
    place = announcing.find(b"avih") + 8 + 16
    announcing[place : place + 4] = b"\xff\xff\xff\x7f"
    (folder / "announces.avi").write_bytes(announcing)
    first, *others = avi.split(b"\xff\xc0")[1:]
    grown = [part[:3] + b"\x3e\x80\x3e\x80" + part[7:] for part in others]
    (folder / "grows.avi").write_bytes(b"\xff\xc0".join([avi.split(b"\xff\xc0")[0], first, *grown]))
    (folder / "\udcfc.mp4").write_bytes(good)
    lines = [f'"{name}" {number % 2}' for number, name in enumerate([*ODD, *SOUND])]
    lines += ["good.mp4 0 1e300 2e300", "good.mp4 0 0 1e300", *["good.mp4 1"] * 20]
    (folder / "list.csv").write_bytes(os.fsencode("\n".join(lines)))
    here = os.open(".", os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)  # a socket's path is limited to about a hundred bytes
        server.bind("socket.mp4")
        os.fchdir(here)
        os.close(here)
        yield folder / "list.csv"


def require_reasons(found: dict[str, str]) -> None:
    assert {Path(name).name for name in found} == {Path(name).name for name in [*ODD, "good.mp4"]}
    for name, reason in found.items():
        expected = {Path(odd).name: said for odd, said in ODD.items()} | {
            "good.mp4": "no frame starts in its window"
        }
        assert expected[Path(name).name] in reason, name


def test_check_and_prepare_name_odd_inputs_and_leave_them_out(odd_list: Path, tmp_path: Path) -> None:
    out = tmp_path / "check"
    words = ["check-data", str(odd_list), "--out", str(out), "--processes", "1", "--samples", "2"]
    prepare = ["prepare", str(odd_list), "--out", "prepared", "--processes", "1", "--min-psnr", "0"]
    done, prepared = run_in_turn([words, prepare], tmp_path)
    assert done.returncode == prepared.returncode == 1, done.stderr + prepared.stderr
    assert "\x1b" not in done.stdout + prepared.stdout
    assert prepared.stdout.count("left out: ") == len(ODD) + 1
    with (out / "report.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        report = list(csv.DictReader(file))
    require_reasons({line["path"]: line["detail"] for line in report if line["bad"] == "true"})
    clean, bad = read_list(out / "clean.csv"), read_list(out / "quarantine.csv")
    assert {row.path.name for row in clean} == set(SOUND)
    assert len(clean) + len(bad) == len(report) == len(read_list(odd_list))


def train(odd_list: Path, out: Path, *, workers: int) -> dict[str, str]:
    """Train for one step of an epoch; return the bad samples and their reasons."""
    words = ["pretrain", "demo", "--data.train-list", str(odd_list), "--out", str(out), *SMALL]
    words += ["--data.num-workers", str(workers), "--data.max-bad-share", "1", "--batch.global-size", "39"]
    words += ["--batch.micro-size", "13", "--run.max-steps", "1", "--optim.warmup-epochs", "0"]
    done = compute(words)
    assert done.returncode == 0, done.stderr
    assert len(losses(out)) == 1
    lines = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    return {line["path"]: line["reason"] for line in lines}


@pytest.fixture(scope="module")
def trained(odd_list: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    require_reasons(train(odd_list, out, workers=1))
    return out


def test_training_counts_and_names_odd_inputs(trained: Path, odd_list: Path, tmp_path: Path) -> None:
    require_reasons(train(odd_list, tmp_path / "run", workers=0))
    assert losses(tmp_path / "run") == losses(trained)


def test_predict_skips_odd_inputs_with_a_line(trained: Path, odd_list: Path, tmp_path: Path) -> None:
    """Inputs from a list, and inputs on the command line."""
    shared = ["--num-workers", "0", "--allow-unreadable", "--features"]
    named = [str(odd_list.with_name(name)) for name in ("pipe.mp4", "zero.mp4", "loop.mp4", "a" * 300, "good.mp4")]
    listed, some = run_in_turn(
        [
            ["predict", str(trained), "--list", str(odd_list), *shared, "listed.safetensors"],
            ["predict", str(trained), *named, *shared, "named.safetensors"],
        ],
        tmp_path,
    )
    assert listed.returncode == 0, listed.stderr
    assert some.returncode == 0, some.stderr
    skipped = [line for line in listed.stderr.splitlines() if line.startswith("cannot read ")]
    assert len(skipped) == len(ODD) + 1
    assert [sum(reason in line for line in skipped) for reason in (IS_NO_FILE, "no such file")] == [3, 1]
    assert some.stderr.count("cannot read ") == 4
    assert "1 videos x 64 features" in some.stdout


def test_lack_of_memory_is_a_bad_sample(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While reading frames, while making a clip, and while making the views of a video."""

    def lack(*words: object, **rest: object) -> None:
        raise MemoryError

    rows, config = read_list(demo_folder / "train.csv")[:3], get_recipe("demo").data
    dataset = ClipDataset(rows, PretrainCut(config), seed=0, noise_length=1)
    views = ViewDataset(rows, get_recipe("demo_ft").data, ViewsConfig(num_temporal=1, num_spatial=1))  # type: ignore

    def lack_in_torch(*words: object) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(views_module, "resize_shorter_side", lack_in_torch)
        assert views[1].bad == "there is not enough memory to read it"
    for lacks in (lack, lack_in_torch):
        monkeypatch.setattr(PretrainCut, "clip", lacks)
        clip = dataset[SampleKey(0, 0)]
        assert not clip.was_read
        assert len(clip.bad) == MAX_REPLACEMENTS + 1
        assert {bad.reason for bad in clip.bad} == {"there is not enough memory to make a clip of it"}
        monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(PyavReader, "_pixels", lack)
        assert {bad.reason for bad in dataset[SampleKey(0, 0)].bad} == {"there is not enough memory to read it"}
        assert views[1].bad == "there is not enough memory to read it"
    assert dataset[SampleKey(0, 0)].was_read
    assert views[1].bad is None


@pytest.mark.parametrize("reader", ["pyav", "decord", "torchcodec"])
def test_more_pixels_than_allowed_are_not_decoded(reader: ReaderName, tmp_path: Path) -> None:
    """The limit for all frames of a clip, and the one for a single frame, which is a sixteenth of it."""
    if obstacle(reader) is not None:
        pytest.skip(f"{reader} is not here")
    encode(tmp_path / "a.mp4", "libx264", "yuv420p")
    frame = 64 * 64
    video = Video(tmp_path / "a.mp4", reader=reader, max_pixels=20 * frame)
    assert video.read(range(20)).shape == (20, 64, 64, 3)
    with pytest.raises(VideoReadError, match="21 frames of 64x64 pixels are more at a time than"):
        video.read(range(21))
    assert Video(tmp_path / "a.mp4", reader=reader, max_pixels=16 * frame).num_frames == 24
    with pytest.raises(VideoReadError, match=rf"allows {frame - 1} pixels a frame"):
        Video(tmp_path / "a.mp4", reader=reader, max_pixels=16 * frame - 1)


def test_long_thin_video_is_not_blown_up_by_resizing(tmp_path: Path) -> None:
    encode(tmp_path / "thin.avi", "mjpeg", "yuvj420p", width=8, height=8000, frames=2)
    data = replace(get_recipe("demo_ft").data, image_size=224, max_pixels=2**25)
    views = ViewDataset([VideoRow(tmp_path / "thin.avi", 0)], data, ViewsConfig(num_temporal=1, num_spatial=1))  # type: ignore
    assert "resized to a shorter side of 224, are more than data.max_pixels" in (views[0].bad or "")


def test_video_of_too_many_packets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packets, "_MOST_PACKETS", 23)
    for name, codec, pix_fmt in (("a.mp4", "libx264", "yuv420p"), ("a.mov", "mjpeg", "yuvj420p")):
        encode(tmp_path / name, codec, pix_fmt)
        with pytest.raises(VideoReadError, match="more than 23 frames"):
            Video(tmp_path / name, reader="pyav")
