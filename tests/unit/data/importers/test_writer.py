"""The whole of `everest index`: the files that it writes, its messages, and the files that it must not touch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from everest_ds import cli
from everest_ds.data.importers.registry import IMPORTERS
from everest_ds.data.lists.classes import read_class_names, require_known_labels, resolve_classes
from everest_ds.data.lists.video_list import read_list
from everest_ds.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "my videos"
    for name in ("run fast/a, 1.mp4", "run fast/b 2.mp4", "run fast/c.mp4", "sit/d.mp4", "sit/e.mp4", "top.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def index(source: Path, out: Path, *flags: str) -> int:
    return cli.main(["index", "folder", str(source), "--out", str(out), *flags])


def test_lists_are_those_that_training_reads(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(source)
    out = tmp_path / "lists" / "new"
    assert index(source, out, "--val-share", "0.4", "--test-share", "0", "--seed", "3") == 0
    assert snapshot(source) == before
    assert sorted(path.name for path in out.iterdir()) == [
        "classes.txt", "left_out.txt", "summary.json", "train.csv", "val.csv",
    ]  # fmt: skip
    assert read_class_names(out / "classes.txt") == ("run fast", "sit")
    train, val = read_list(out / "train.csv"), read_list(out / "val.csv")
    classes = resolve_classes(train, out / "train.csv", None, None)
    require_known_labels(val, out / "val.csv", classes, {row.label for row in train})
    assert {row.path for row in [*train, *val]} == {source / name for name in before if name != "top.mp4"}
    assert all(classes.names and classes.names[row.label] == row.path.parent.name for row in [*train, *val])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["options"] == {"val_share": 0.4, "test_share": 0.0, "seed": 3, "class_names": None}
    assert summary["splits"]["train"] == {"videos": len(train), "classes": 2, "unlabelled": 0, "windows": 0}
    assert summary["left_out"] == {"a video in no class's folder": {"count": 1, "examples": ["top.mp4"]}}
    shown = capsys.readouterr().out
    assert f"folder in {source}: 2 classes" in shown
    assert f"train     {len(train)} videos of 2 classes: {out / 'train.csv'}" in shown
    assert "left out  1, a video in no class's folder, e.g. top.mp4" in shown


def test_missing_videos_are_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "k400", tmp_path / "out"
    (source / "videos").mkdir(parents=True)
    rows = "".join(f"zumba,video{number:06d},0,10,{'train' if number < 3 else 'val'}\n" for number in range(5))
    (source / "all.csv").write_text(f"label,youtube_id,time_start,time_end,split\n{rows}")
    (source / "videos" / "video000001_000000_000010.mp4").touch()
    assert cli.main(["index", "kinetics", str(source), "--out", str(out)]) == 0
    assert (out / "missing.txt").read_text().splitlines() == [
        f"{split}\tzumba/video{number:06d}_000000_000010"
        for split, number in [("train", 0), ("train", 2), ("val", 3), ("val", 4)]
    ]
    assert "missing   4 videos (2 of train, 2 of val)" in capsys.readouterr().out
    assert not (out / "val.csv").exists()
    assert json.loads((out / "summary.json").read_text())["missing"]["by_split"] == {"train": 2, "val": 2}


def test_import_replaces_and_removes_its_own_files_only(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert index(source, out, "--val-share", "0.4") == 0
    (out / "notes.md").write_text("mine")
    first = snapshot(out)
    assert index(source, out, "--val-share", "0.4") == 0
    assert {name: data for name, (data, _) in snapshot(out).items()} == {n: data for n, (data, _) in first.items()}
    (source / "top.mp4").unlink()
    assert index(source, out, "--val-share", "0", "--test-share", "0") == 0  # no val.csv, nothing left out
    assert sorted(snapshot(out)) == ["classes.txt", "notes.md", "summary.json", "train.csv"]

    (out / "classes.txt").write_text("edited\n")
    edited = snapshot(out)
    assert index(source, out) == 2
    assert "classes.txt was changed since it was written" in capsys.readouterr().err
    assert snapshot(out) == edited


@pytest.mark.parametrize("name", ["train.csv", "val.csv", "classes.txt", "summary.json", "left_out.txt"])
def test_files_of_others_are_not_overwritten(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}" if name.endswith("json") else "mine 0\n")
    before = snapshot(out)
    assert index(source, out, "--val-share", "0.6", "--test-share", "0") == 2
    assert "not written by everest index" in capsys.readouterr().err
    assert snapshot(out) == before


def test_import_that_was_cut_short_can_be_repeated(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert index(source, out, "--val-share", "0.4") == 0
    whole = {name: data for name, (data, _) in snapshot(out).items()}
    (out / "summary.json").unlink()  # written last, so its absence means an unfinished run
    (out / "val.csv").unlink()
    assert index(source, out, "--val-share", "0.4") == 0
    assert {name: data for name, (data, _) in snapshot(out).items()} == whole


@pytest.mark.parametrize("inside", [".", "lists", "sit/lists"])
def test_nothing_is_written_into_the_dataset(
    inside: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(source)
    (tmp_path / "link").symlink_to(source)
    for root in (source, tmp_path / "link"):
        assert index(source, root / inside) == 2
        assert "where nothing is written" in capsys.readouterr().err
    assert snapshot(source) == before


def test_lists_above_the_dataset_name_its_videos_relatively(source: Path, tmp_path: Path) -> None:
    assert index(source, tmp_path, "--val-share", "0", "--test-share", "0") == 0
    assert '"my videos/run fast/a, 1.mp4" 0' in (tmp_path / "train.csv").read_text().splitlines()


def test_class_that_no_line_can_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / " a").mkdir(parents=True)
    (tmp_path / "data" / " a" / "1.mp4").touch()
    assert index(tmp_path / "data", tmp_path / "out") == 2
    assert "the class name ' a' does not fit in a line of classes.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_lists_the_datasets_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(IMPORTERS) == ["folder", "ucf101", "hmdb51", "kinetics", "ssv2", "oscc"]
    assert cli.main(["index", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in IMPORTERS)
    assert cli.main(["index"]) == 2
    assert cli.main(["index", "ucf100", "x", "--out", "y"]) == 2
    assert "did you mean 'ucf101'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("folder", "val-share test-share seed class-names"),
        ("ucf101", "split annotations"),
        ("hmdb51", "split annotations class-names"),
        ("kinetics", "annotations class-names"),
        ("ssv2", "annotations"),
        ("oscc", "annotations"),
    ],
)
def test_options_of_each_dataset_are_frozen(
    dataset: str, options: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["index", dataset, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{option}" in shown for option in ["out", *options.split()])
    seen: list[Any] = []
    monkeypatch.setattr("everest_ds.commands.data.index.index", lambda *given: seen.append(given))
    assert cli.main(["index", dataset, "SRC", "--out", "DIR"]) == 0
    assert seen == [(dataset, Path("SRC"), Path("DIR"), IMPORTERS[dataset].options())]


def test_source_that_is_no_folder_and_out_that_is_a_file_are_refused(source: Path, tmp_path: Path) -> None:
    from everest_ds.data.importers.writer import require_apart

    assert index(tmp_path / "absent", tmp_path / "out") == 2
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder; name a folder"):
        require_apart(source, tmp_path / "file")
