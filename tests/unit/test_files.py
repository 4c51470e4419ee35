from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.files import is_partial, partial_path, whole_file, write_whole_text


def test_whole_file_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("earlier")
    write_whole_text(path, "later\nü\r\n")
    assert path.read_bytes() == "later\nü\r\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_file_that_is_not_finished_leaves_the_earlier_one_and_nothing_else(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "list.csv"
    path.write_text("earlier")

    def write_half() -> None:
        with whole_file(path) as partial:
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
