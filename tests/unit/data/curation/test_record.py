from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.data.curation.record import Record
from everest_ds.errors import UserError


def open_record(path: Path, samples: int = 8) -> Record[str, int]:
    return Record(
        path,
        {"samples": samples},
        of="check",
        parse=lambda line: (line["name"], int(line["frames"])),
        holds=lambda line: line["frames"] > 0,
    )


def test_last_line_of_a_name_counts_if_it_holds(tmp_path: Path) -> None:
    record = open_record(tmp_path / "findings.jsonl")
    assert record.read() == {}
    for name, frames in (("a", 1), ("b", 2), ("c", 3), ("a", 4), ("b", 0)):
        record.append({"name": name, "frames": frames})
    assert open_record(tmp_path / "findings.jsonl").read() == {"a": 4, "c": 3}


def test_line_that_was_cut_short_is_left_out_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "findings.jsonl"
    open_record(path).append({"name": "a", "frames": 1})
    with path.open("a") as file:
        file.write('{"name": "b", "fra')
    record = open_record(path)
    assert record.read() == {"a": 1}
    record.append({"name": "c", "frames": 3})
    assert record.read() == {"a": 1, "c": 3}


def test_other_settings_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "findings.jsonl"
    open_record(path).append({"name": "a", "frames": 1})
    with pytest.raises(UserError, match=r"contains a check with .*'samples': 8.*now .*'samples': 9"):
        open_record(path, samples=9).read()
    for text in ("a video list\n", "[1]\n", '{"settings": {"samples": 8}}\n{"name": "a"}\n'):
        path.write_text(text)
        with pytest.raises(UserError, match="is not a check's record"):
            open_record(path).read()
