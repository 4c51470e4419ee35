"""`everest check-data`: names videos that hang, crash or cannot be read, and checks all others."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from everest_ds import cli
from everest_ds.commands.data import check_data as command
from everest_ds.commands.data.check_data import CheckOptions, check_data
from everest_ds.data.curation.probe import FaultName, Finding, Kind, ProbeSettings, probe_video
from everest_ds.data.lists.run_lists import read_lists
from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.errors import UserError
from everest_ds.recipes import get_recipe


def probe_or_misbehave(row: VideoRow, settings: ProbeSettings) -> Finding:
    """A reader that hangs on one video and ends its process on another."""
    if row.path.name == "hangs.mp4":
        time.sleep(600)
    if row.path.name == "crashes.mp4":
        os._exit(9)
    return probe_video(row, settings)


@pytest.fixture
def mixed_list(demo_folder: Path, tmp_path: Path) -> Path:
    """Ten good videos, one of them twice, and one video with each fault."""
    good = [row.path for row in read_list(demo_folder / "train.csv")[:10]]
    for name in ("hangs.mp4", "crashes.mp4"):
        (tmp_path / name).write_bytes(good[0].read_bytes())
    (tmp_path / "no video.mp4").write_text("text")
    lines = [f'"{path}" {number % 2}' for number, path in enumerate([*good, good[0]])]
    lines += ["hangs.mp4 0", "crashes.mp4 1", "no video.mp4 0", "gone.mp4 1"]
    (tmp_path / "all.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "all.csv"


def report(out: Path) -> list[dict[str, str]]:
    with (out / "report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_faults_are_named_and_the_lists_part_good_from_bad(
    mixed_list: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "probe_video", probe_or_misbehave)
    options = CheckOptions(processes=2, timeout_s=2.0)
    assert check_data(mixed_list, options) == 1
    out = mixed_list.with_name("all-check")
    kinds = [line["kind"] for line in report(out)]
    assert kinds == ["good"] * 11 + ["hanging", "crashing", "unreadable", "missing"]
    assert [line["bad"] for line in report(out)] == ["false"] * 11 + ["true"] * 4
    rows = read_list(mixed_list)
    clean, quarantine = read_list(out / "clean.csv"), read_list(out / "quarantine.csv")
    assert [row.path.resolve() for row in clean] == [row.path.resolve() for row in rows[:11]]
    assert [row.label for row in clean] == [row.label for row in rows[:11]]
    assert [row.path.name for row in quarantine] == ["hangs.mp4", "crashes.mp4", "no video.mp4", "gone.mp4"]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["rows"], summary["bad"], summary["duplicate_rows"]) == (15, 4, 1)
    said = capsys.readouterr().out
    assert "hangs.mp4: no answer within 2 s" in said
    assert "crashes.mp4: it ended its process (exit code 9)" in said
    assert "4 of 15 rows are bad (26.67%)" in said


def test_second_call_goes_on_and_looks_again_at_what_has_changed(
    mixed_list: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "probe_video", probe_or_misbehave)
    options = CheckOptions(processes=1, timeout_s=2.0, max_bad_share=0.5)
    assert check_data(mixed_list, options) == 0
    out = mixed_list.with_name("all-check")
    before = report(out)
    record = out / "findings.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:6]) + lines[6][:20])  # killed while it wrote the sixth finding
    good = read_list(demo_folder / "train.csv")[20].path
    mixed_list.with_name("no video.mp4").write_bytes(good.read_bytes())  # mended
    capsys.readouterr()
    assert check_data(mixed_list, options) == 0
    assert "6 of 15 rows are already checked" in capsys.readouterr().out  # five findings, one of them of two rows
    assert [line["kind"] for line in report(out)] == [
        "good" if line["path"].endswith("no video.mp4") else line["kind"] for line in before
    ]


def test_other_settings_and_foreign_folders_are_refused(mixed_list: Path, tmp_path: Path) -> None:
    options = CheckOptions(processes=1, out=tmp_path / "out")
    check_data(mixed_list, options)
    with pytest.raises(UserError, match=r"contains a check with .*'min_frames': 1.*name another folder"):
        check_data(mixed_list, replace(options, min_frames=5))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "findings.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="is not a check's record"):
        check_data(mixed_list, replace(options, out=tmp_path / "foreign"))


def test_quarantine_is_left_out_of_a_run(mixed_list: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["check-data", str(mixed_list), "--out", str(out), "--bad", "missing", "unreadable"]) == 1
    recipe = get_recipe("demo")
    data = replace(recipe.data, train_list=str(mixed_list), quarantine=str(out / "quarantine.csv"))
    left = read_lists(replace(recipe, data=data)).train
    assert [row.path.name for row in left] == [row.path.name for row in read_list(mixed_list)[:13]]
    with pytest.raises(UserError, match="leaves no video"):
        read_lists(replace(recipe, data=replace(data, quarantine=str(mixed_list))))


def test_quarantine_of_a_sound_list_is_empty_and_leaves_nothing_out(demo_folder: Path, tmp_path: Path) -> None:
    source = demo_folder / "train.csv"
    assert check_data(source, CheckOptions(processes=1, samples=2, out=tmp_path)) == 0
    assert (tmp_path / "quarantine.csv").read_text() == ""
    recipe = get_recipe("demo")
    data = replace(recipe.data, train_list=str(source), quarantine=str(tmp_path / "quarantine.csv"))
    assert len(read_lists(replace(recipe, data=data)).train) == len(read_list(source))
    with pytest.raises(UserError, match=r"cannot read the list of videos .*gone.csv"):
        read_lists(replace(recipe, data=replace(data, quarantine=str(tmp_path / "gone.csv"))))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--timeout-s", "0"], "--timeout-s 0.0 must be above 0"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--max-bad-share", "1.5"], "--max-bad-share 1.5"),
        (["--bad", "good"], "invalid choice 'good'"),
    ],
)
def test_wrong_options_are_refused(
    words: list[str], named: str, mixed_list: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["check-data", str(mixed_list), *words])
    except SystemExit as stop:  # the parser's own
        code = int(stop.code or 0)
    assert code == 2
    assert named in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_every_fault_can_be_named_on_the_command_line() -> None:
    assert set(get_args(FaultName)) == {str(kind) for kind in Kind} - {"good"}


def test_command_and_what_its_workers_import_need_no_torch() -> None:
    program = "import sys, everest_ds.commands.data.check_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
