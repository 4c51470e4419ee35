"""`everest benchmark data`: its records and table, and what it refuses. Speeds are not checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from everest_ds.cli import main
from tests.integration.test_bad_input import refused
from tests.unit.data.readers.video_files import write_ramp

KEYS = {
    "benchmark", "recipe", "list", "way", "repeats", "videos", "left_out", "frames", "sizes", "clip",
    "sampling_stride", "sampling_seconds", "rounds", "ms", "clip_ms", "clip_p90_ms", "ratio_to_official",
    "clips_per_s_core", "loader_clips_per_s", "gpu_clips_per_s", "gpus_fed", "cores_per_gpu", "environment",
}  # fmt: skip
PHASES = ["open", "decode", "augment", "collate", "copy"]


def records(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["benchmark", "data", *words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def ramps(tmp_path: Path) -> Path:
    """A list of ramps, a missing file and a file that is not a video."""
    for name in "abc":
        write_ramp(tmp_path / f"{name}.mp4")
    (tmp_path / "noise.mp4").write_bytes(b"no video at all" * 50)
    (tmp_path / "ramps.csv").write_text("a.mp4 0\ngone.mp4 0\nb.mp4 1\nnoise.mp4 1\nc.mp4 0\n")
    return tmp_path / "ramps.csv"


def test_every_list_and_way_gives_a_record_with_all_that_was_measured(
    demo_folder: Path, ramps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = str(demo_folder / "train.csv")
    words = ["demo", "--lists", demo, str(ramps), "--compare", "--repeats", "1", "2", "--rounds", "2"]
    found = records([*words, "--readers", "decord", "--workers", "--clips", "5", "--clips-per-s", "50"], capsys)
    ways = [("official", 1), ("decord", 1), ("decord", 2)]
    assert [(one["list"], one["way"], one["repeats"]) for one in found] == [
        (name, *way) for name in (demo, str(ramps)) for way in ways
    ]
    for one in found:
        assert set(one) == KEYS
        assert list(one["ms"]) == PHASES
        assert one["rounds"] == 2
        assert all(one["ms"][phase] > 0 for phase in PHASES[:4])
        assert one["loader_clips_per_s"] == {}
        assert one["cores_per_gpu"] * one["clips_per_s_core"] == pytest.approx(50, rel=1e-3)
        cores = one["environment"]["cores"]
        assert one["gpus_fed"] == {"all_cores": pytest.approx(cores * one["clips_per_s_core"] / 50, abs=1e-3)}
        assert one["environment"]["cpu"]
        assert {"torch", "torchvision", "decord", "av", "pillow", "everest_ds"} <= set(
            one["environment"]["versions"]
        )
    assert [one["ratio_to_official"] for one in found if one["way"] == "official"] == [1.0, 1.0]
    assert (found[0]["videos"], found[0]["frames"], found[0]["sizes"]) == (5, [32, 32], ["64x64"])
    assert (found[0]["clip"], found[0]["sampling_stride"]) == ("16x48x48", 2)
    assert (found[3]["videos"], found[3]["frames"], found[3]["sizes"]) == (3, [40, 40], ["96x64"])
    assert [Path(bad["path"]).name for bad in found[3]["left_out"]] == ["gone.mp4", "noise.mp4"]


def test_table_names_what_is_left_out_and_has_the_loaders_speed(
    ramps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["benchmark", "data", "demo", "--data.train-list", str(ramps), "--rounds", "1", "--workers", "1"]
    assert main([*words, "--readers", "pyav", "--clips-per-s", "200"]) == 0
    shown = capsys.readouterr().out
    assert f"left out: {ramps.parent / 'noise.mp4'}: " in shown
    assert f"left out: {ramps.parent / 'gone.mp4'}: no such file (pyav)" in shown
    assert "3 videos, 2 left out, 40 frames, 96x64" in shown
    (head,) = (line.split() for line in shown.splitlines() if line.startswith("list "))
    (line,) = (line.split() for line in shown.splitlines() if line.startswith(f"{ramps} "))
    assert head == ["list", "way", "repeats", *PHASES, "clip", "p90", "ratio", "1", "core", "1", "proc."]
    assert line[1:3] == ["pyav", "1"]
    assert line[7] == "-"  # no GPU, no copy
    assert float(line[11]) > 0
    assert float(line[-1]) > 0
    assert "GPUs that train 200 clips/s:" in shown
    assert "1 processes feed" in shown


def test_fine_tuning_clips_are_measured_with_their_augmentation(
    demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["demo_ft", "--data.train-list", str(demo_folder / "train.csv"), "--rounds", "1", "--clips", "3"]
    words += ["--data.mixup-alpha", "0.8", "--data.erase-prob", "1", "--workers"]
    (one,) = records([*words, "--data.reader", "pyav"], capsys)  # the run's reader, if none is named
    assert (one["way"], one["videos"], one["ratio_to_official"]) == ("pyav", 3, None)
    assert "--compare" in refused(["benchmark", "data", *words, "--compare"], capsys)


def test_what_cannot_be_measured_is_refused(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(name: str, *flags: str) -> str:
        return refused(["benchmark", "data", "demo", "--lists", name, "--workers", *flags], capsys)

    demo = str(demo_folder / "train.csv")
    (tmp_path / "empty.csv").write_text("")
    assert "is empty" in said(str(tmp_path / "empty.csv"))
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(b"no video at all" * 50)
    (tmp_path / "noise.csv").write_text("a.mp4 0\nb.mp4 1\n")
    assert "none of 2 videos of" in (text := said(str(tmp_path / "noise.csv"), "--readers", "pyav"))
    assert "a.mp4" in text
    assert "everest check-data" in text
    assert "data.keep_decoded" in said(demo, "--data.keep-decoded")
    write_ramp(tmp_path / "ramp.mp4")
    (tmp_path / "windows.csv").write_text("ramp.mp4 0 1.0 2.0\n")
    assert "1 rows are windows" in said(str(tmp_path / "windows.csv"), "--compare")
    for module in ("everest_ds.data.readers.choice", "everest_ds.benchmark.options"):
        monkeypatch.setattr(f"{module}.obstacle", {"decord": "not installed; install it"}.get)
    assert "data.reader=decord is not available" in said(demo, "--readers", "decord")
    assert "--compare needs decord" in said(demo, "--compare")


def test_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("everest_ds.commands.parsing.speaks_first", lambda text, world: True)
    assert "start it without a launcher" in refused(["benchmark", "data", "demo"], capsys)
