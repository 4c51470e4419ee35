from __future__ import annotations

import hashlib
import math
import os
import re
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from everest_ds.data.lists import video_list
from everest_ds.data.lists.list_line import LineError, parse_line
from everest_ds.data.lists.run_lists import read_lists
from everest_ds.data.lists.video_list import (
    VideoRow,
    can_be_listed,
    describe_repeats,
    find_videos,
    fingerprint,
    format_list,
    read_list,
    require_reachable,
    window_fault,
    write_list,
)
from everest_ds.errors import UserError
from everest_ds.recipes import get_recipe


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
        ("a.mp4 zero\n", "line 1: 'a.mp4 zero' has no label: its last field 'zero' is not a number"),
        ("a.mp4 1.5\n", "has the label 1.5, which is not a whole number"),
        ("a.mp4 3 1.5\n", "a window needs both times"),
        ("a.mp4 3 2 1.5\n", "line 1: 'a.mp4 3 2 1.5': the window from 2.0 s to 1.5 s is empty"),
        ("a.mp4 0\na.mp4 3 -1.0 2.0\n", "line 2: 'a.mp4 3 -1.0 2.0': the window starts at -1.0 s"),
        ("a.mp4 3 2.0 2.0\n", "line 1: 'a.mp4 3 2.0 2.0': the window from 2.0 s to 2.0 s is empty"),
        ("a.mp4 3 -2.0 -1.0\n", "starts at -2.0 s"),
        (f"a.mp4 3 1.0 {'9' * 400}.0\n", "is not finite"),
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
    os.mkfifo(tmp_path / "pipe.csv")  # a pipe without a writer
    with pytest.raises(UserError, match="it is not a file"):
        read_list(tmp_path / "pipe.csv")


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
    with pytest.raises(UserError, match=r"empty contains no video: no file .* ends in one of .*\.mp4"):
        find_videos([tmp_path / "good", tmp_path / "empty"])


@pytest.mark.parametrize(
    ("line", "path", "label", "window"),
    [
        ("videos/a b.mp4 3 12.0 20.0", "videos/a b.mp4", 3, (12.0, 20.0)),
        ("a.mp4,3,0.5,1.25", "a.mp4", 3, (0.5, 1.25)),
        ("a.mp4, 3, 0.5, 1.25", "a.mp4", 3, (0.5, 1.25)),
        ("a.mp4\t3 .5,8.", "a.mp4", 3, (0.5, 8.0)),
        ('"a, b 7.mp4" -1 0.0 +8.0', "a, b 7.mp4", -1, (0.0, 8.0)),
        ("a 7 8 1.0 2.0", "a 7", 8, (1.0, 2.0)),
        ("a 3 12 20", "a", 3, (12.0, 20.0)),
        ("a 3 12.0 20", "a", 3, (12.0, 20.0)),
        ("a 3 12 20.5", "a", 3, (12.0, 20.5)),
        ('"a 3 1.0 2.0" 5', "a 3 1.0 2.0", 5, (None, None)),
        ('"a 3" 1 2 5', "a 3", 1, (2.0, 5.0)),
    ],
)
def test_window_follows_the_label(
    line: str, path: str, label: int, window: tuple[float | None, float | None], tmp_path: Path
) -> None:
    (tmp_path / "list.csv").write_text(line + "\n")
    (row,) = read_list(tmp_path / "list.csv")
    assert (row.path, row.label, (row.start_s, row.end_s)) == (tmp_path / path, label, window)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (-0.5, 2.0, "starts at"),
        (2.0, 1.0, "is empty"),
        (math.nan, 1.0, "not finite"),
        (0.0, math.inf, "not finite"),
        (1.0, None, "give both or neither"),
        (None, 1.0, "give both or neither"),
    ],
)
def test_row_that_has_no_window_in_its_times_cannot_be_made(
    start: float | None, end: float | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        VideoRow(Path("a.mp4"), 0, start_s=start, end_s=end)


def test_list_of_every_kind_of_row_is_read_alike_on_every_system(tmp_path: Path) -> None:
    """One list mixes separators, line ends, a byte order mark, spaces, commas and non-Latin scripts."""
    text = '\ufeffa b.mp4 0\r\nc,d.mp4,1\n"e, f.mp4"\t7\r\n\r\n跳 ü.mp4 , 3 , 0.0 , 8.5\n/v/g.mp4 -1'
    (tmp_path / "list.csv").write_bytes(text.encode())
    names = ["a b.mp4", "c,d.mp4", "e, f.mp4", "跳 ü.mp4", "/v/g.mp4"]
    expected = list(zip([tmp_path / name for name in names], [0, 1, 7, 3, -1], [1, 2, 3, 5, 6], strict=True))
    rows = read_list(tmp_path / "list.csv")
    assert [(row.path, row.label, row.line) for row in rows] == expected
    assert [row.end_s for row in rows] == [None, None, None, 8.5, None]


def test_fingerprint_of_lists_without_windows_is_what_it_was_and_windows_change_it() -> None:
    rows = [VideoRow(Path("a/x.mp4"), 0), VideoRow(Path("a/y.mp4"), 1)]
    assert fingerprint(rows) == "2 videos, 761c6825de27"  # computed by a version without windows
    windows = [(0.0, 8.0), (0.0, 8.5), (1.0, 8.0)]
    cut = [[rows[0], VideoRow(Path("a/y.mp4"), 1, start_s=start, end_s=end)] for start, end in windows]
    assert len({fingerprint(one) for one in [rows, *cut]}) == 4


def test_repeated_rows_are_kept_and_told(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a.mp4 0\nb.mp4 1\na.mp4 0\na.mp4 2\na.mp4 0 0.0 4.0\na.mp4 0 4.0 8.0\n")
    rows = read_list(tmp_path / "list.csv")
    assert len(rows) == 6
    note = describe_repeats(rows)
    assert note == (
        f"2 rows repeat an earlier one, 1 of them with another label, the first is {tmp_path / 'a.mp4'} in line 3, "
        "listed in line 1 already; all are kept"
    )
    assert describe_repeats([rows[0], rows[1], rows[4], rows[5]]) is None


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12)
PIECES = st.sampled_from(
    ['"', " ", ",", "\t", "7", "-1", "1.5", "ü", "\u00a0", "\u2028", "\ufeff", "\n", "x", "\x1f"]
)
TRICKY = st.lists(PIECES, min_size=1, max_size=8).map("".join)
TIMES = st.floats(0, 1e9, allow_nan=False) | st.sampled_from([0.0, 1e-7, 1e22, 5e-324])


@given(
    names=st.lists(st.lists(TRICKY | NAMES, min_size=1, max_size=3).map("/".join), min_size=1, max_size=4),
    label=st.integers(-1, 10**6),
    times=st.none() | st.tuples(TIMES, TIMES).filter(lambda pair: pair[0] < pair[1]),
    below=st.booleans(),
)
@example(names=["\ufeffa.mp4"], label=0, times=None, below=True)
@example(names=['"'], label=3, times=None, below=True)
@example(names=['"a 3 1.0 2.0"'], label=0, times=(0.0, 1e-7), below=True)
@example(names=["a 3", "b,", " c", "d ", "\ufeffe"], label=4, times=(1.0, 1e22), below=False)
def test_written_list_is_read_as_the_same_rows(
    names: list[str],
    label: int,
    times: tuple[float, float] | None,
    below: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    start, end = times or (None, None)
    root = folder if below else Path("/elsewhere")
    rows = [VideoRow(root / name, label, start_s=start, end_s=end) for name in names]
    if any(len(name.splitlines()) != 1 or name.splitlines()[0] != name for name in names):
        with pytest.raises(UserError, match="cannot be in the list"):
            write_list(folder / "list.csv", rows)
        return
    write_list(folder / "list.csv", rows)
    assert read_list(folder / "list.csv") == rows


def test_written_list_names_videos_below_it_relatively_and_quotes_where_it_must(tmp_path: Path) -> None:
    paths = ["in/a.mp4", "in/a b.mp4", "in/7", "in/a,b.mp4", 'in/"a"', '"a"']
    rows = [VideoRow(tmp_path / path, 5) for path in paths]
    rows += [VideoRow(Path("/else/a.mp4"), 6, start_s=12.0, end_s=20.5)]
    assert format_list(tmp_path / "list.csv", rows).splitlines() == [
        "in/a.mp4 5",
        '"in/a b.mp4" 5',
        "in/7 5",
        '"in/a,b.mp4" 5',
        'in/"a" 5',
        '"""a""" 5',
        "/else/a.mp4 6 12.0 20.5",
    ]


def test_row_relative_to_the_program_is_the_same_file_from_a_list_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lists").mkdir()
    touch(tmp_path, "videos/a.mp4")
    monkeypatch.chdir(tmp_path)
    write_list(Path("lists/list.csv"), [VideoRow(Path("videos/a.mp4"), 1)])
    assert read_list(Path("lists/list.csv"))[0].path.samefile("videos/a.mp4")


def test_names_that_no_text_or_no_file_can_have_are_rows_of_a_list(tmp_path: Path) -> None:
    """Names with zero bytes or invalid UTF-8 make bad samples; they must not stop a run."""
    rows = [VideoRow(tmp_path / os.fsdecode(name), 3) for name in (b"\xfc.mp4", b"a\0 b.mp4", b"\xff \xfe,1.mp4")]
    write_list(tmp_path / "list.csv", rows)
    assert read_list(tmp_path / "list.csv") == rows
    assert fingerprint(rows).startswith("3 videos, ")


WORDS = st.sampled_from(
    [
        "a.mp4", "b/c.mp4", "./a.mp4", "/v//a.mp4", "a/./b", "a/", ".", "..", "./.a", "a/.", "7", "-a", "#", "[",
        "{", "path", "label", "3", "nan", "-inf", "-1", "+2", "1.0", "2.", ".5", "1.5", "-0.5", "1e3", "1234567890",
        "12.0000000000000001", '"a b.mp4"', '"./a"', '"a""b"', '"', '""', "ü", "\udcfc", "跳.mp4", "\u00a0",
        "\ufeff", "\0", ";", "|", "\x1f",
    ]
)  # fmt: skip
GAPS = st.sampled_from([" ", ",", "\t", ", ", "  ", "", " \r", "\u2003", "\x85"])
ENDS = st.sampled_from(["\n", "\n", "\n\n", "\r\n", "\r", "\u2028", "\x0c"])


@given(lines=st.lists(st.tuples(st.lists(st.tuples(WORDS, GAPS), max_size=6), ENDS), min_size=1, max_size=5))
@example(lines=[([("a.mp4", " "), ("7", " "), ("3", "")], "\n"), ([("7", ","), ("b/c.mp4", ","), ("3", "")], "\n")])
@example(
    lines=[([("a.mp4", " "), ("3", "")], "\n"), ([("a.mp4", ","), ("3", ","), (".5", ","), ("2.", "")], "\r\n")]
)
def test_many_lines_at_a_time_say_what_each_says_alone(
    lines: list[tuple[list[tuple[str, str]], str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The oracle splits the text with str.splitlines and parses line by line."""
    path = tmp_path_factory.getbasetemp() / "mixed.csv"
    text = "first.mp4 0\n" + "".join("".join(map("".join, words)) + end for words, end in lines)
    path.write_bytes(os.fsencode(text))
    expected: list[tuple[int, Path, int, float | None, float | None]] = []
    fault = None
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            found = parse_line(line, number) if line.strip() else None
        except LineError as error:
            fault = f"line {number}: {line.strip()!r} {error}"
            break
        if found is not None:
            fault = window_fault(found.start_s, found.end_s)
            if fault is not None:
                break
            expected.append((number, path.parent / found.path, found.label, found.start_s, found.end_s))
    if fault is not None:
        with pytest.raises(UserError, match=re.escape(fault)):
            read_list(path)
        return
    rows = read_list(path)
    assert [(row.line, row.path, row.label, row.start_s, row.end_s) for row in rows] == expected
    names = [f"{row.path.name} {row.label}" for row in rows]
    if all(row.start_s is None and row.path != path.parent for row in rows):  # the path "." has an empty name
        digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
        assert fingerprint(rows) == f"{len(rows)} videos, {digest[:12]}"


@pytest.mark.parametrize("block_bytes", [7, 16, 64])
def test_lists_are_the_same_in_blocks_of_any_size(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks may contain only blank lines, start with rows without windows, or be cut between CR and LF."""
    text = "a.mp4 0\r\n" + "\r\n" * 90 + "b.mp4 1\r\r\n" + "\n" * 90 + "ü.mp4 2 0.5 1.0\r\n" * 9 + "last.mp4 3"
    (tmp_path / "list.csv").write_bytes(text.encode())
    whole = read_list(tmp_path / "list.csv")
    lines = [number for number, line in enumerate(text.splitlines(), start=1) if line]
    assert [row.line for row in whole] == lines
    monkeypatch.setattr(video_list, "_BLOCK_BYTES", block_bytes)
    again = read_list(tmp_path / "list.csv")
    assert again == whole
    assert [row.line for row in again] == lines


def test_line_of_a_million_characters_answers_at_once(tmp_path: Path) -> None:
    began = time.perf_counter()
    for line in ("x" * 10**6, "1 " * 500_000, '"' * 10**6, "filename" * 125_000 + "!", "a" * 10**6 + ".mp4 3"):
        for before, after, number in (("", "", 1), ("a.mp4 0\n", "\nb.mp4 1\n", 2)):
            (tmp_path / "list.csv").write_text(before + line + after)
            with pytest.raises(UserError, match=f"line {number}: .* is longer than a path can be"):
                read_list(tmp_path / "list.csv")
    assert time.perf_counter() - began < 5.0  # measured 0.1 s; an earlier pattern took minutes


def test_rows_take_few_bytes_and_no_look_at_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of 200,000 rows: Python's after reading (measured 11 kB), while reading (20 MB), and shared memory.

    One object per row took 110 MB, and 136 MB while reading.
    """
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "0.mp4").touch()
    text = "".join(f"videos/{number}.mp4 {number % 7}\n" for number in range(200_000))
    (tmp_path / "list.csv").write_text(text)
    looked: list[Any] = []
    for name in ("lstat", "stat"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *words, original=original, **rest: looked.append(words) or original(*words, **rest)
        )
    config = get_recipe("demo")
    config = replace(config, data=replace(config.data, train_list=str(tmp_path / "list.csv")))
    tracemalloc.start()
    lists = read_lists(config)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(lists.train) == 200_000
    assert held < 200_000 * 2
    assert peak < 200_000 * 200
    assert os.fstat(lists.train.memory[0]).st_size < 200_000 * 40  # type: ignore[attr-defined]
    assert len(looked) < 200
    assert lists.train[123_456] == VideoRow(tmp_path / "videos/123456.mp4", 123_456 % 7)


def test_nothing_to_write_and_names_with_line_breaks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no video for the list"):
        write_list(tmp_path / "list.csv", [])
    assert not can_be_listed(Path("a\u2028.mp4"))
    assert not can_be_listed(Path(os.fsdecode(b"\xfc.mp4")))
    with pytest.raises(UserError, match="has a line break; rename it"):
        write_list(tmp_path / "list.csv", [VideoRow(Path("a\n.mp4"), 0)])
    assert not (tmp_path / "list.csv").exists()
