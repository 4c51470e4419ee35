from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from everest_ds.data.lists.contents import describe_change, sample_contents
from everest_ds.data.lists.video_list import VideoRow


def make_videos(folder: Path, num: int = 40) -> list[VideoRow]:
    folder.mkdir()
    for number in range(num):
        (folder / f"{number} ü.mp4").write_bytes(bytes([number]) * 300_000)
    return [VideoRow(folder / f"{number} ü.mp4", 0) for number in range(num)]


def test_sixteen_videos_are_looked_at_wherever_they_lie_and_whenever_they_were_written(tmp_path: Path) -> None:
    rows = make_videos(tmp_path / "a")
    was = sample_contents(rows)
    assert len(was.split("\n")) == 16
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = [VideoRow(tmp_path / "b" / row.path.name, 0) for row in rows]
    assert sample_contents(moved) == was
    assert describe_change(was, sample_contents(moved)) is None


@pytest.mark.parametrize("place", [0, 65_535, 299_999])
def test_size_and_both_ends_are_compared(place: int, tmp_path: Path) -> None:
    rows = make_videos(tmp_path / "a")
    was = sample_contents(rows)
    for row in rows:
        data = bytearray(row.path.read_bytes())
        data[place] ^= 1
        row.path.write_bytes(data)
    assert "16 of 16 sampled videos" in str(describe_change(was, sample_contents(rows)))


def test_files_that_cannot_be_read_do_not_count(tmp_path: Path) -> None:
    """Unreadable files include an endless one and a pipe without a writer."""
    rows = make_videos(tmp_path / "a", num=5)
    was = sample_contents(rows)
    for row, replace in zip(
        rows,
        (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)),
        strict=False,
    ):
        row.path.unlink()
        replace(row.path)
    assert describe_change(was, sample_contents(rows)) is None
    assert describe_change(sample_contents(rows), was) is None
    rows[4].path.write_bytes(b"short")
    changed = describe_change(was, sample_contents(rows))
    assert changed == "1 of 1 sampled videos have other content now, e.g. 4 ü.mp4"


def test_names_are_printed_escaped(tmp_path: Path) -> None:
    row = VideoRow(tmp_path / "\x1b[31m \udcff.mp4", 0)
    row.path.write_text("a")
    was = sample_contents([row])
    row.path.write_text("b")
    assert r"\x1b[31m \udcff.mp4" in str(describe_change(was, sample_contents([row])))
