from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path

import pytest

from everest_ds.files import (
    append_json_lines,
    atomic_path,
    drop_torn_line,
    is_partial,
    partial_path,
    read_json_lines,
    sha256,
    write_atomically,
    write_csv,
    write_json,
)


def test_written_file_replaces_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("earlier")
    write_atomically(path, "later\nü\r\n")
    assert path.read_bytes() == "later\nü\r\n".encode()
    write_atomically(path, b"bytes")
    assert path.read_bytes() == b"bytes"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_file_that_is_not_finished_leaves_the_earlier_one_and_nothing_else(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "list.csv"
    path.write_text("earlier")

    def write_half() -> None:
        with atomic_path(path) as partial:
            partial.write_text("lat")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_partial_files_are_told_from_others(tmp_path: Path) -> None:
    assert is_partial(partial_path(tmp_path / "config.json"))
    assert not is_partial(tmp_path / "config.json")
    assert not is_partial(tmp_path / ".config.json")


def test_folder_is_there_whole_and_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    partial_path(folder).mkdir()
    (partial_path(folder) / "stale").touch()
    with atomic_path(folder) as partial:
        partial.mkdir()
        (partial / "config.json").write_text("{}")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert list(tmp_path.iterdir()) == [folder]


def test_folder_that_is_not_finished_is_removed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), atomic_path(tmp_path / "weights") as partial:
        partial.mkdir()
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_json_and_csv_are_as_readers_expect_them(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1]})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": [\n    1\n  ]\n}\n'
    write_csv(tmp_path / "a.csv", ["x", "y"], [[1, "a,b"], [None, True]])
    assert (tmp_path / "a.csv").read_bytes() == b'x,y\n1,"a,b"\n,True\n'


def test_lines_survive_a_last_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    drop_torn_line(path)
    assert not path.exists()
    append_json_lines(path, [{"a": 1}, {"b": "\u00fc"}])
    with path.open("a") as file:
        file.write('{"c": ')
    assert read_json_lines(path) == [{"a": 1}, {"b": "\u00fc"}]
    drop_torn_line(path)
    append_json_lines(path, [{"d": 2}])
    assert read_json_lines(path) == [{"a": 1}, {"b": "\u00fc"}, {"d": 2}]


def test_whole_line_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text("{}\nx\n")
    with pytest.raises(json.JSONDecodeError):
        read_json_lines(tmp_path / "lines.jsonl")


def test_checksum_covers_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    before = sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert sha256(tmp_path) != before


def test_same_bytes_are_not_written_again_and_a_link_is_replaced(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "a.json", tmp_path / "elsewhere"
    write_atomically(path, "same")
    before = path.stat()
    partial_path(path).write_text("of a killed process")
    write_atomically(path, "same")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [path]
    elsewhere.write_text("same")
    path.unlink()
    path.symlink_to(elsewhere)
    write_atomically(path, "same")
    assert not path.is_symlink()


def test_file_and_its_name_are_flushed_before_and_after_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("os.fsync", lambda file: seen.append(os.readlink(f"/proc/self/fd/{file}")))
    write_csv(tmp_path / "a.csv", ["x"], [])
    write_json(tmp_path / "a.json", {})
    folder = str(tmp_path)
    assert seen == [f"{folder}/.a.csv.partial", folder, f"{folder}/.a.json.partial", folder]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_file_system_that_cannot_flush_names_is_no_error_and_a_broken_one_is(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="Input") if code == errno.EIO else contextlib.nullcontext():
        write_json(tmp_path / "a.json", {})


def test_lines_are_not_appended_to_one_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"b')
    append_json_lines(path, [{"c": 3}])
    assert path.read_text() == '{"a": 1}\n{"b\n{"c": 3}\n'
