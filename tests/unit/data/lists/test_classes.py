from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.data.lists.classes import Classes, read_class_names, require_known_labels, resolve_classes
from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.errors import UserError


def write_list(folder: Path, *labels: int, name: str = "train.csv") -> tuple[list[VideoRow], Path]:
    path = folder / name
    path.write_text("".join(f"v{number}.mp4 {label}\n" for number, label in enumerate(labels)))
    return read_list(path), path


def test_names_are_read_in_the_order_of_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffarchery\r\n  riding a bike \r\nüben\r\n\r\n".encode())
    assert read_class_names(path) == ("archery", "riding a bike", "üben")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\n", "names.txt, line 2 is blank"),
        (b"\na\n", "line 1 is blank"),
        (b"a\nb\na\n", "line 3: 'a' is already in line 1; make names unique"),
        (b"", "are empty"),
        (b" \n", "are empty"),
        (b"\xff\xfe\x00\x81", "are not UTF-8 text"),
    ],
)
def test_bad_names_are_refused_with_their_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_class_names(tmp_path / "names.txt")
    assert message in str(caught.value)


def test_missing_names_are_refused(tmp_path: Path) -> None:
    rows, train_list = write_list(tmp_path, 0, 1)
    with pytest.raises(UserError, match=r"absent\.txt: No such file"):
        resolve_classes(rows, train_list, str(tmp_path / "absent.txt"), None)


def test_classes_come_from_the_largest_label_without_names(tmp_path: Path) -> None:
    rows, train_list = write_list(tmp_path, 4, 0, 2)
    classes = resolve_classes(rows, train_list, None, None)
    assert classes == Classes(5)
    assert classes.untrained({0, 2, 4}) == [1, 3]


def test_classes_come_from_the_names_beside_the_list(tmp_path: Path) -> None:
    rows, train_list = write_list(tmp_path, 0, 1)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert resolve_classes(rows, train_list, None, None) == Classes(3, ("a", "b", "c"))


def test_given_names_come_before_those_beside_the_list(tmp_path: Path) -> None:
    rows, train_list = write_list(tmp_path, 0, 1)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    (tmp_path / "other.txt").write_text("x\ny\n")
    assert resolve_classes(rows, train_list, str(tmp_path / "other.txt"), None) == Classes(2, ("x", "y"))


def test_given_number_counts_and_must_agree_with_the_names(tmp_path: Path) -> None:
    rows, train_list = write_list(tmp_path, 0, 1)
    assert resolve_classes(rows, train_list, None, 7) == Classes(7)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert resolve_classes(rows, train_list, None, 3).num == 3
    with pytest.raises(UserError, match=r"data\.num_classes=7, but .*classes\.txt names 3 classes; leave out"):
        resolve_classes(rows, train_list, None, 7)


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        (
            (0, 3, 1),
            3,
            r"train\.csv, line 2: label 3 of .*v1\.mp4 is not in the range 0 to 2 \(data.num_classes=3\)",
        ),
        ((0, 1, -1), None, r"train\.csv, line 3: label -1 of .*v2\.mp4 is not in the range 0 to 1"),
        ((-1, -1), None, r"label -1 of .*v0\.mp4 is not in the range 0 and above; correct"),
        (
            (0, 2**31 - 1, 1),
            None,
            r"train\.csv, line 2: label 2147483647 would mean 2147483648 classes; correct it",
        ),
        ((0, 0), None, r"train\.csv has only one class \(the largest label is 0\)"),
    ],
)
def test_labels_out_of_range_are_refused(
    labels: tuple[int, ...], num_classes: int | None, message: str, tmp_path: Path
) -> None:
    rows, train_list = write_list(tmp_path, *labels)
    with pytest.raises(UserError, match=message):
        resolve_classes(rows, train_list, None, num_classes)


def test_label_above_the_names_is_refused(tmp_path: Path) -> None:
    rows, train_list = write_list(tmp_path, 0, 2)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"label 2 .* 0 to 1 \(.*classes\.txt names 2\)"):
        resolve_classes(rows, train_list, None, None)


def test_scored_list_must_keep_to_the_range_and_to_trained_classes(tmp_path: Path) -> None:
    classes = Classes(4, ("a", "b", "c", "d"))
    rows, source = write_list(tmp_path, 0, 1, 1, name="val.csv")
    require_known_labels(rows, source, classes, {0, 1})
    rows, source = write_list(tmp_path, 0, 3, 1, 3, name="val.csv")
    with pytest.raises(UserError, match=r"val\.csv, line 2: .*v1\.mp4 has class 3 \(d\), but") as caught:
        require_known_labels(rows, source, classes, {0, 2})
    assert "the training list has no video of class 1 (b), class 3 (d); add" in str(caught.value)
    rows, source = write_list(tmp_path, 0, 4, name="val.csv")
    with pytest.raises(UserError, match=r"line 2: label 4 .* 0 to 3 \(the run has 4 classes\)"):
        require_known_labels(rows, source, classes, {0, 1, 2, 3})


def test_rows_without_a_line_are_named_by_their_path() -> None:
    with pytest.raises(UserError, match=r"^train\.csv: label 9 of a\.mp4"):
        resolve_classes([VideoRow(Path("a.mp4"), 9)], Path("train.csv"), None, 2)


def test_many_classes_are_named_by_the_first_few() -> None:
    assert Classes(9).describe_all(range(7)) == "class 0, class 1, class 2, class 3, class 4 and 2 more"
    assert Classes(9).describe_all([8]) == "class 8"
