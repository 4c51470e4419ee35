"""The choice of a reader in the commands: same labels with each reader, and refused files are reported."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from everest_ds import cli
from everest_ds.data.readers.choice import READERS, obstacle
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.sizes import get_size
from everest_ds.recipes import get_recipe
from everest_ds.train.tasks import encoder_options
from tests.integration.launch import compute
from tests.unit.data.readers.video_files import write_ramp, write_turned

OPEN_GOP = "its frames refer to frames beyond a keyframe (open GOPs); use --data.reader pyav"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of the demo's size; its large head gives distinct logits."""
    config = get_recipe("demo_ft")
    torch.manual_seed(0)
    model = EverestClassifier(
        get_size(config.model.size),
        config.position_grid,
        encoder_options(config),
        num_classes=8,
        head_init_scale=10.0,
    )
    path = tmp_path_factory.mktemp("weights") / "demo.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five that every reader accepts, and `open.mp4`, which decord does not."""
    folder = tmp_path_factory.mktemp("videos")
    for number, (name, codec, b_frames) in enumerate(
        [("a.mp4", "libx264", 2), ("b.mkv", "libx264", 2), ("c.avi", "mpeg4", 0), ("d.webm", "libvpx-vp9", 0)]
    ):
        write_ramp(folder / name, 20 + 5 * number, codec=codec, b_frames=b_frames)
    write_turned(folder / "mirrored.mp4", "left to right", num_frames=8)
    write_ramp(folder / "open.mp4", codec="libx265", b_frames=3)
    return folder


def working_readers() -> list[str]:
    return [reader for reader in READERS if obstacle(reader) is None]


def test_predict_gives_the_same_labels_with_every_reader(weights: Path, videos: Path) -> None:
    files = [str(path) for path in sorted(videos.iterdir()) if path.name != "open.mp4"]
    said = {}
    for reader in working_readers():
        words = ["predict", str(weights), *files, "--recipe", "demo_ft", "--json", "--num-workers", "0"]
        words += ["--num-temporal", "1", "--num-spatial", "1"]
        done = compute([*words, "--reader", reader])
        assert done.returncode == 0, done.stderr
        said[reader] = [
            json.loads(line)["predictions"] for line in done.stdout.splitlines() if line.startswith("{")
        ]
        assert len(said[reader]) == len(files)
    assert len(said) > 1 or sys.platform != "linux"
    assert all(lines == said["pyav"] for lines in said.values())
    assert len({line[0]["probability"] for line in said["pyav"]}) == len(files)  # no two videos are alike


def test_check_data_reports_files_that_the_reader_of_a_run_refuses(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if obstacle("decord"):
        pytest.skip("decord is not installed")
    names = sorted(path.name for path in videos.iterdir())
    (tmp_path / "all.csv").write_text("".join(f"{videos / name} {number}\n" for number, name in enumerate(names)))
    words = ["check-data", str(tmp_path / "all.csv"), "--processes", "1"]
    for reader, bad in (("decord", ["open.mp4"]), ("auto", [])):
        out = tmp_path / reader
        code = cli.main([*words, "--reader", reader, "--out", str(out)])
        assert code == (1 if bad else 0)
        with (out / "report.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert [Path(line["path"]).name for line in lines if line["bad"] == "true"] == bad
        assert {line["kind"] for line in lines} <= {"good", "unreadable", "duplicate_frames"}
        said = capsys.readouterr().out
        assert (OPEN_GOP in said) == bool(bad)
        assert [OPEN_GOP in line["detail"] for line in lines] == [
            bad == [Path(line["path"]).name] for line in lines
        ]


def test_file_without_a_duration_names_the_reader_that_reads_it(
    real_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if obstacle("decord"):
        pytest.skip("decord is not installed")
    (tmp_path / "one.csv").write_text(f"{real_clips / 'bad' / 'real_no_duration.webm'} 0\n")
    words = ["check-data", str(tmp_path / "one.csv"), "--processes", "1", "--out"]
    assert cli.main([*words, str(tmp_path / "decord"), "--reader", "decord"]) == 1
    assert "decord finds no duration in the file; use --data.reader pyav" in capsys.readouterr().out
    assert cli.main([*words, str(tmp_path / "auto")]) == 0
