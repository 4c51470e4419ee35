"""Lists of a run with common flaws: repeated rows, gaps in the labels, missing files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from everest_ds.data.lists.run_lists import Lists, read_lists
from everest_ds.errors import UserError
from everest_ds.recipes import find_config


def read(folder: Path, recipe: str = "demo_ft", **lists: str) -> Lists:
    """Read a recipe's lists from texts. Of the videos, only a.mp4 exists."""
    (folder / "a.mp4").touch()
    for name, text in lists.items():
        (folder / f"{name}.csv").write_text(text)
    config = find_config(recipe)
    return read_lists(
        replace(config, data=replace(config.data, **{name: str(folder / f"{name}.csv") for name in lists}))  # type: ignore[arg-type]
    )


def test_repeated_rows_of_every_list_are_kept_and_told(tmp_path: Path) -> None:
    lists = read(
        tmp_path, train_list="a.mp4 0\nb.mp4 1\na.mp4 0\n", val_list="a.mp4 0\n", test_list="a.mp4 1\na.mp4 0\n"
    )
    assert len(lists.train) == 3
    train, test = tmp_path / "train_list.csv", tmp_path / "test_list.csv"
    place = f"the first is {tmp_path / 'a.mp4'} in line"
    assert lists.note == (
        f"{train}: 1 rows repeat an earlier one, {place} 3, listed in line 1 already; all are kept; "
        f"{test}: 1 rows repeat an earlier one, 1 of them with another label, {place} 2, listed in line 1 already; "
        "all are kept"
    )
    assert read(tmp_path, train_list="a.mp4 0\nb.mp4 1\n").note is None
    note = read(tmp_path, "demo", train_list="a.mp4 0\na.mp4 1\n").note
    assert note is not None
    assert "1 rows repeat" in note


def test_labels_that_skip_a_number_are_classes_without_a_training_video(tmp_path: Path) -> None:
    lists = read(tmp_path, train_list="a.mp4 0\nb.mp4 3\na.mp4 0 0.0 1.0\n")
    assert lists.classes is not None
    assert lists.classes.num == 4
    assert lists.note == "no training video for class 1, class 2"
    with pytest.raises(
        UserError, match=r"test_list\.csv, line 2: .* has class 2, but the training list has no video"
    ):
        read(tmp_path, train_list="a.mp4 0\nb.mp4 3\n", test_list="a.mp4 0\na.mp4 2\n")


def test_some_missing_files_pass_and_all_missing_do_not(tmp_path: Path) -> None:
    assert len(read(tmp_path, train_list="gone.mp4 0\na.mp4 1\n").train) == 2
    with pytest.raises(UserError, match="none of 2 files probed"):
        read(tmp_path, train_list="gone.mp4 0\nlost.mp4 1\n")
