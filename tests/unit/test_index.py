from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.data.index import VideoRow, find_videos, fingerprint, read_list, require_reachable
from everest_ds.errors import UserError


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a.mp4 3", "a.mp4", 3),
        ("a.mp4,3", "a.mp4", 3),
        ("a.mp4, 3", "a.mp4", 3),
        ("a.mp4\t3", "a.mp4", 3),
        ("my videos/a b.mp4 3", "my videos/a b.mp4", 3),
        ("my videos/a b.mp4,3", "my videos/a b.mp4", 3),
        ("a,b.mp4 3", "a,b.mp4", 3),
        ('"a, b.mp4",3', "a, b.mp4", 3),
        ("a.mp4 -1", "a.mp4", -1),
        ("跳 ü.mp4 12", "跳 ü.mp4", 12),
        ("  a.mp4   3  ", "a.mp4", 3),
    ],
)
def test_row_is_split_at_the_last_separator(line: str, path: str, label: int, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(line + "\n", encoding="utf-8")
    (row,) = read_list(tmp_path / "list.csv")
    assert (row.path, row.label) == (tmp_path / path, label)


def test_absolute_paths_stay_absolute(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("/videos/a.mp4 0\n")
    assert read_list(tmp_path / "list.csv")[0].path == Path("/videos/a.mp4")


def test_byte_order_mark_crlf_and_blank_lines_are_no_part_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbfa.mp4 0\r\n\r\nb.mp4 1\r\n")
    rows = read_list(tmp_path / "list.csv")
    assert [(row.path.name, row.label) for row in rows] == [("a.mp4", 0), ("b.mp4", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("a.mp4 0\nb.mp4\n", "line 2: 'b.mp4' has no label"),
        ("a.mp4 zero\n", "line 1: 'a.mp4 zero' has no label"),
        ("a.mp4 1.5\n", "has no label"),
    ],
)
def test_bad_list_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        read_list(tmp_path / "list.csv")
    assert message in str(caught.value)
    assert str(tmp_path / "list.csv") in str(caught.value)


def test_missing_list_and_a_list_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_list(tmp_path / "absent.csv")
    (tmp_path / "video.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="not UTF-8"):
        read_list(tmp_path / "video.csv")


def test_list_into_the_wrong_folder_is_refused_but_single_gaps_are_not(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("".join(f"videos/{i}.mp4 0\n" for i in range(100)))
    rows = read_list(tmp_path / "list.csv")
    with pytest.raises(UserError, match="none of 100 files probed"):
        require_reachable(rows, tmp_path / "list.csv")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "7.mp4").touch()
    require_reachable(rows, tmp_path / "list.csv")


def test_fingerprint_changes_with_names_labels_and_order_but_not_with_folders() -> None:
    rows = [VideoRow(Path("a/x.mp4"), 0), VideoRow(Path("a/y.mp4"), 1)]
    assert fingerprint(rows).startswith("2 videos, ")
    assert fingerprint([VideoRow(Path("b") / row.path.name, row.label) for row in rows]) == fingerprint(rows)
    others = [
        rows[::-1],
        rows[:1],
        [rows[0], VideoRow(Path("a/y.mp4"), 2)],
        [rows[0], VideoRow(Path("a/z.mp4"), 1)],
    ]
    assert len({fingerprint(other) for other in [rows, *others]}) == 5


def test_path_that_the_file_system_refuses_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of 1 files probed"):
        require_reachable([VideoRow(tmp_path / ("a" * 300), 0)], tmp_path / "list.csv")


def test_rows_carry_their_line_which_does_not_tell_them_apart(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a.mp4 0\n\nb.mp4 1\n")
    rows = read_list(tmp_path / "list.csv")
    assert [row.line for row in rows] == [1, 3]
    assert rows[1] == VideoRow(tmp_path / "b.mp4", 1)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_find_videos_takes_files_as_given_and_searches_folders_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.MP4", "b/1.avi", "b/a/3.webm", "b/notes.txt", "b/.hidden.mp4", "b/.cache/4.mp4", "odd.bin")
    found = find_videos([tmp_path / "odd.bin", tmp_path / "b", tmp_path / "b" / "1.avi"])
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == ["odd.bin", "b/1.avi", "b/2.MP4", "b/a/3.webm"]


def test_find_videos_refuses_a_missing_path_and_a_folder_without_videos(tmp_path: Path) -> None:
    touch(tmp_path, "empty/notes.txt", "good/1.mp4")
    with pytest.raises(UserError, match=r"absent is neither a file nor a folder"):
        find_videos([tmp_path / "good", tmp_path / "absent"])
    with pytest.raises(UserError, match=r"empty holds no video: no file .* ends in one of .*\.mp4"):
        find_videos([tmp_path / "good", tmp_path / "empty"])
