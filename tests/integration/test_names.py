"""Videos with odd names, and windows of a list, in the commands as users type them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.sizes import get_size
from everest_ds.recipes import get_recipe
from everest_ds.train.tasks import encoder_options
from tests.integration.scanning import run_in_turn
from tests.integration.test_bad_input import refused
from tests.unit.data.readers.video_files import write_ramp

# FFmpeg's protocols, options, formats, separators and quotes of lists, numbers, other scripts.
NAMES = [
    "10:30:00.mp4", "file:a.mp4", "concat:a|b.mp4", "subfile,,start,0,end,9,,:a.mp4", "-dash.mp4", "--help.mp4",
    "100%d.mp4", "# hash.mp4", "#hash.mp4", "a, b.mp4", " spaces .mp4", "tab\there.mp4", 'a "quote".mp4', '"a".mp4',
    "a;b.mp4", "1,a.mp4", "ends 7.mp4", "[0]{a}*?~$HOME.mp4", "跳 ü.mp4",
]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of the demo's size with three classes."""
    config = get_recipe("demo_ft")
    torch.manual_seed(0)
    size = get_size(config.model.size)
    options = encoder_options(config)
    model = EverestClassifier(size, config.position_grid, options, num_classes=3, head_init_scale=10.0)
    path = tmp_path_factory.mktemp("weights") / "demo.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_odd_names_pass_every_command(weights: Path, tmp_path: Path) -> None:
    """In folders and lists with equally odd names, by relative paths."""
    write_ramp(tmp_path / "ramp.mp4", 24)
    folder = tmp_path / "1:2 %s"
    (folder / "-class #").mkdir(parents=True)
    for name in NAMES:
        (folder / "-class #" / name).hardlink_to(tmp_path / "ramp.mp4")
    (folder / "10:00.csv").write_text("10:30:00.mp4 0\n-dash.mp4 0 1 2\n")
    shared = ["--recipe", "demo_ft", "--num-workers", "0", "--json", "--top", "1"]
    done = run_in_turn(
        [
            ["index", "folder", "1:2 %s", "--out", "a:b", "--val-share", "0", "--test-share", "0"],
            ["check-data", "a:b/train.csv", "--processes", "1", "--samples", "2", "--out", "c:%d"],
            ["prepare", "a:b/train.csv", "--out", "p:q", "--processes", "1"],
            ["predict", str(weights), "--list", "p:q/train.csv", *shared],
            ["predict", str(weights), "1:2 %s/-class #", *shared],
        ],
        tmp_path,
    )
    assert [one.returncode for one in done] == [0] * 5, "".join(one.stderr for one in done)
    assert [row.path.name for row in read_list(tmp_path / "a:b" / "train.csv")] == sorted(NAMES)
    with (tmp_path / "c:%d" / "report.csv").open(newline="") as file:
        report = list(csv.DictReader(file))
    assert [(Path(line["path"]).name, line["kind"]) for line in report] == [
        (name, "good") for name in sorted(NAMES)
    ]
    prepared, plain = ([json.loads(line) for line in one.stdout.splitlines()] for one in done[3:])
    assert len(prepared) == len(NAMES)
    assert [Path(line["path"]).name for line in plain] == sorted(NAMES)
    assert not any("error" in line for line in (*prepared, *plain))


def test_odd_names_in_the_folder_where_the_program_runs(weights: Path, tmp_path: Path) -> None:
    """Here the path is the bare name, without a slash."""
    for name in ("10:30:00.mp4", "-dash.mp4", "http:a.mp4"):
        write_ramp(tmp_path / name, 24)
    (tmp_path / "-list:1.csv").write_text("10:30:00.mp4 7\n-dash.mp4 900 1 2\n")
    shared = ["--recipe", "demo_ft", "--num-workers", "0", "--json"]
    done = run_in_turn(
        [
            ["predict", *shared, "--reader", "pyav", "--", str(weights), "-dash.mp4", "10:30:00.mp4"],
            ["predict", str(weights), "http:a.mp4", "--list=-list:1.csv", *shared, "--reader", "decord"],
            ["check-data", "--processes", "1", "--", "-list:1.csv"],
        ],
        tmp_path,
    )
    assert [one.returncode for one in done] == [0] * 3, "".join(one.stderr for one in done)
    lines = [json.loads(line) for one in done[:2] for line in one.stdout.splitlines()]
    assert [line["path"] for line in lines] == [
        "-dash.mp4",
        "10:30:00.mp4",
        "http:a.mp4",
        "10:30:00.mp4",
        "-dash.mp4",
    ]
    assert (lines[4]["start_s"], lines[4]["end_s"]) == (1.0, 2.0)
    assert not any("start_s" in line for line in lines[:4])
    assert (tmp_path / "-list:1-check" / "report.csv").is_file()


def test_predict_takes_the_windows_of_a_list_and_names_them(weights: Path, tmp_path: Path) -> None:
    """A window gives the same as a file with the same frames; the labels in the list are ignored."""
    write_ramp(tmp_path / "ramp.mp4", 40)
    (tmp_path / "list.csv").write_text("ramp.mp4 900 0 2\nramp.mp4 -1 2 4.0\nramp.mp4 0\nramp.mp4 0 8 9\n")
    words = ["predict", str(weights), "--recipe", "demo_ft", "--num-workers", "0", "--list", "list.csv"]
    done, shown = run_in_turn(
        [[*words, "--features", "f.safetensors", "--allow-unreadable"], [*words, "--top", "1"]], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "cannot read ramp.mp4 [8, 9) s: no frame starts in its window" in done.stderr
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        metadata, features_ND = file.metadata(), file.get_tensor("features")
    assert json.loads(metadata["windows"]) == [[0.0, 2.0], [2.0, 4.0], None]
    assert len(features_ND.unique(dim=0)) == 3
    assert shown.returncode == 2  # one row cannot be read
    named = [line for line in shown.stdout.splitlines() if line.startswith("ramp.mp4")]
    assert named == ["ramp.mp4 [0, 2) s", "ramp.mp4 [2, 4) s", "ramp.mp4"]


def test_predict_without_videos_and_with_lists_that_are_none_is_refused(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(weights), "--recipe", "demo_ft"]
    assert "needs a video, a folder of videos, or --list FILE" in refused(words, capsys)
    (tmp_path / "frames.csv").write_text("frames/clip_a 120 3\n")
    said = refused([*words, "--list", str(tmp_path / "frames.csv")], capsys)
    assert "line 1: 'frames/clip_a 120 3' looks like a row of frame folders" in said
    (tmp_path / "gone.csv").write_text("gone.mp4 0 0 3\n")
    assert "none of 1 files probed" in refused([*words, "--list", str(tmp_path / "gone.csv")], capsys)


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_name_that_is_not_utf8_is_read_or_named(
    reader: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from everest_ds.data.readers.video import Video, VideoReadError

    write_ramp(tmp_path / "a.mp4", 24)
    odd = (tmp_path / "a.mp4").rename(tmp_path / "\udcfc.mp4")
    if reader == "pyav":
        assert Video.of_row(VideoRow(odd, 0), "pyav").num_frames == 24
        return
    with pytest.raises(VideoReadError, match="its name is not UTF-8"):
        Video.of_row(VideoRow(odd, 0), "decord")
