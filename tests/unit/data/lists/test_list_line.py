"""Lines of lists: valid ones are parsed, others are refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.data.lists.list_line import LineError, ListLine, parse_line
from everest_ds.data.lists.video_list import VideoRow, format_list, read_list, require_reachable
from everest_ds.errors import UserError


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vids/a.mov 0 0 3", ListLine("vids/a.mov", 0, 0.0, 3.0)),
        ("vids/a.mov,1,12,20.5", ListLine("vids/a.mov", 1, 12.0, 20.5)),
        ("a b.mov\t1\t.5\t1e1", ListLine("a b.mov", 1, 0.5, 10.0)),
        ("my clip 2.mp4 0 0 3", ListLine("my clip 2.mp4", 0, 0.0, 3.0)),
        ("a.mov 3.0", ListLine("a.mov", 3)),
        ("a.mov 3. 1.0 2.0", ListLine("a.mov", 3, 1.0, 2.0)),
        ("a.mov +2", ListLine("a.mov", 2)),
        ('"a, b.mp4","3"', ListLine("a, b.mp4", 3)),
        ('"a.mp4","3","1","2"', ListLine("a.mp4", 3, 1.0, 2.0)),
        ('"say ""hi"", 7.mp4",1', ListLine('say "hi", 7.mp4', 1)),
        ('"a "b" c.mp4" 5', ListLine('a "b" c.mp4', 5)),  # format of older versions
        ('""a"" 5', ListLine('"a"', 5)),  # also of older versions
        ('"12 13" 5', ListLine("12 13", 5)),
        ("a.mp4,3,", ListLine("a.mp4", 3)),
        ("a.mp4,3,,", ListLine("a.mp4", 3)),  # start and end are empty
        ("#20_Rhythm.avi 3", ListLine("#20_Rhythm.avi", 3)),
        ("10:30:00.mp4 3", ListLine("10:30:00.mp4", 3)),
        ("-a%d.mp4 3", ListLine("-a%d.mp4", 3)),
        ("[group] a;b.mp4 3", ListLine("[group] a;b.mp4", 3)),
        ("in/7 3", ListLine("in/7", 3)),
        (f"{'9' * 5000},a.mp4,3", ListLine(f"{'9' * 5000},a.mp4", 3)),
        (f"a.mp4 {'0' * 50}3", ListLine("a.mp4", 3)),
    ],
)
def test_line_says_path_label_and_window(line: str, expected: ListLine) -> None:
    assert parse_line(line, 1) == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("frames/clip_a 120 3", "frame folders (path, number of frames, label)"),
        ("frames/clip_a,120,3", "frame folders"),
        ("a.mp4 30 4", "frame folders"),
        ("path,label", "header row (columns path, label)"),
        ("video_path label", "header row"),
        ("filename,label,start,end", "header row"),
        (",path,label,start_s,end_s", "header row"),
        ('"Path";"Label"', "header row"),
        ("#path\tlabel", "header row"),
        ("id video_name class_id n_frames", "header row"),
        ("0,1", "header row of numbers"),
        ("clip_fn gt", "If the line names the columns, remove it"),
        ("0,a.mp4,3", "begins with its own number"),
        ("1,a.mp4,3", "begins with its own number"),
        ("a.mp4;3", "separates its fields by ';'"),
        ("a.mp4; 3", "separates its fields by ';'"),
        ("a.mp4;3;1,5;2,5", "separates its fields by ';'"),
        ("a.mp4|3", "separates its fields by '|'"),
        ('{"path": "a.mp4", "label": 3}', "looks like JSON"),
        ('["a.mp4", 3],', "looks like JSON"),
        ('{"a.mp4": 0,', "looks like JSON"),
        ("[", "looks like JSON"),
        ("# 2026, all videos 5", "looks like a comment"),
        ("3 a.mp4", "label and path were swapped"),
        ("3,videos/a", "label and path were swapped"),
        ("a.mp4", "has no label"),
        ("a.mp4,", "has no label"),
        ("a.mp4,nan", "has no label"),
        ("a.mp4,,3", "has an empty field"),
        ('"a.mp4",,3', "has an empty field"),
        ("a.mp4 running fast", "its last field 'fast' is not a number"),
        ("a.mp4 3.5", "has the label 3.5, which is not a whole number"),
        ("a.mp4 1.0 2.0 3", "with a decimal point and times without"),  # the label is in the last column
        ("a.mp4,3,1.0,", "a window needs both times"),
        ("a.mp4 1.0 2.0", "a window needs both times"),
        ("a.mp4 3 00:00:12 00:00:20", "not a number of seconds"),
        ("a.mp4 3 0.0 8.5 1.0", "has 4 numbers after 'a.mp4'"),
        ("my video 2 3 12 20", "has 4 numbers after 'my video'"),
        (f"a.mp4 {2**31}", "expected one below 2147483648"),
        ("a.mp4 99999999999999999999", "expected one below 2147483648"),
        (f"a.mp4 -{'9' * 400}.0", "expected one below 2147483648"),
        (f"a.mp4 {'9' * 5000}", "expected one below 2147483648"),
        ("a.mp4 \uff13", "is not a number"),
        ("a.mp4 1e5", "which is not a whole number"),
        ("a.mp4 1 nan 5", "has 'nan' for a time"),
        ("a.mp4,1,0,inf", "is not a number"),
        ("a.mp4,1,-Infinity,7", "has '-Infinity' for a time"),
    ],
)
def test_other_line_is_refused_and_named(line: str, says: str) -> None:
    with pytest.raises(LineError) as caught:
        parse_line(line, 1)
    assert says in str(caught.value)


def test_refusal_names_the_line_and_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\na.mp4 0\nframes/clip_a 120 3\n")
    with pytest.raises(UserError) as caught:
        read_list(tmp_path / "a.csv")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a.csv'}, line 3: 'frames/clip_a 120 3' looks like")
    assert "`path label start end`" in message
    (tmp_path / "a.csv").write_text("x" * 5000)
    with pytest.raises(UserError) as caught:
        read_list(tmp_path / "a.csv")
    assert len(str(caught.value)) < 500


def test_list_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("a.mp4 0\n".encode("utf-16-le"))
    with pytest.raises(UserError, match="UTF-16"):
        read_list(tmp_path / "a.csv")


def test_list_of_folders_is_named(tmp_path: Path) -> None:
    (tmp_path / "clip_a").mkdir()
    (tmp_path / "a.csv").write_text("clip_a 3\n")
    with pytest.raises(UserError, match=r"names folders, e.g. .*clip_a; only video files are read"):
        require_reachable(read_list(tmp_path / "a.csv"), tmp_path / "a.csv")


@pytest.mark.parametrize(
    "name", ["7", "a 7", "1,a.mp4", "# a.mp4", "#a.mp4", "a.mp4;3", 'a "b".mp4', "a 1 2", "[[a", '""', "a,", " a"]
)
def test_path_that_reads_as_something_else_is_written_in_quotes(name: str, tmp_path: Path) -> None:
    row = VideoRow(tmp_path / name, 5, start_s=1.0, end_s=2.0)
    (tmp_path / "a.csv").write_text(format_list(tmp_path / "a.csv", [row]))
    assert read_list(tmp_path / "a.csv") == [row]
