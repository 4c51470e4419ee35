"""Importers of folders, UCF101 and HMDB51 on miniature copies; files are empty because only names are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from everest_ds.data.importers import folder, hmdb51, ucf101
from everest_ds.data.importers.collector import UNLISTABLE, UNNAMED
from everest_ds.data.importers.source_tree import SourceTree
from everest_ds.errors import UserError
from tests.unit.data.importers.layouts import rows_of, touch, write


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    """Three classes as downloaded. As in the real dataset, one folder is spelt differently from its videos."""
    root = tmp_path / "UCF 101"
    write(root / "ucfTrainTestlist" / "classInd.txt", "1 Archery\r\n2 Biking\r\n3 HandstandPushups\r\n")
    train = "Archery/v_Archery_g08_c01.avi 1\r\nBiking/v_Biking_g08_c01.avi 2\r\nBiking/v_Biking_g08_c02.avi 2\r\n"
    write(root / "ucfTrainTestlist" / "trainlist01.txt", train + "Archery/v_Archery_g09_c01.avi 1\r\n")
    write(root / "ucfTrainTestlist" / "trainlist02.txt", "Archery/v_Archery_g01_c01.avi 1\n")
    test = "Archery/v_Archery_g01_c01.avi\nHandstandPushups/v_HandStandPushups_g01_c01.avi\n"
    write(root / "ucfTrainTestlist" / "testlist01.txt", test)
    write(root / "ucfTrainTestlist" / "testlist02.txt", "Archery/v_Archery_g08_c01.avi\n")
    videos = ["Archery/v_Archery_g08_c01", "Archery/v_Archery_g01_c01", "Biking/v_Biking_g08_c01"]
    videos += ["Biking/v_Biking_g08_c02", "Biking/v_Biking_g25_c09", "HandstandPushups/v_HandStandPushups_g01_c01"]
    touch(root / "UCF-101", *(f"{video}.avi" for video in videos), "Biking/._v_Biking_g08_c01.avi")
    return root


def test_ucf101_official_split(ucf: Path) -> None:
    found = ucf101.collect(SourceTree(ucf), ucf101.Ucf101Options())
    assert found.class_names == ("Archery", "Biking", "HandstandPushups")
    assert rows_of(found, ucf / "UCF-101") == {
        "train": [
            ("Archery/v_Archery_g08_c01.avi", 0),
            ("Biking/v_Biking_g08_c01.avi", 1),
            ("Biking/v_Biking_g08_c02.avi", 1),
        ],
        "test": [("Archery/v_Archery_g01_c01.avi", 0), ("HandstandPushups/v_HandStandPushups_g01_c01.avi", 2)],
    }
    assert found.missing == [("train", "Archery/v_Archery_g09_c01.avi")]
    assert found.left_out == {UNNAMED: ["UCF-101/Biking/v_Biking_g25_c09.avi"]}
    assert found.notes == ["1 classes of val or test have no training video, e.g. HandstandPushups"]


def test_ucf101_other_split_elsewhere_and_reencoded_videos(ucf: Path, tmp_path: Path) -> None:
    lists = (ucf / "ucfTrainTestlist").rename(tmp_path / "lists")
    for path in (ucf / "UCF-101").glob("*/v_*.avi"):
        path.rename(path.with_suffix(".MP4"))
    with pytest.raises(UserError, match=r"contains no classInd.txt; .* --annotations"):
        ucf101.collect(SourceTree(ucf), ucf101.Ucf101Options(split=2))
    found = ucf101.collect(SourceTree(ucf), ucf101.Ucf101Options(split=2, annotations=lists))
    assert rows_of(found, ucf / "UCF-101") == {
        "train": [("Archery/v_Archery_g01_c01.MP4", 0)],
        "test": [("Archery/v_Archery_g08_c01.MP4", 0)],
    }


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("classInd.txt", "1 Archery\n3 Biking\n", "line 2: '3 Biking'; expected `2 NAME`"),
        ("classInd.txt", "1 Archery\n2 Archery\n", "line 2: '2 Archery'"),
        (
            "trainlist01.txt",
            "Archery/v_Archery_g08_c01.avi 2\n",
            r"line 1: .* has class 2, but Archery is number 1",
        ),
        ("testlist01.txt", "\nSwimming/v_x.avi\n", "line 2: the class of 'Swimming/v_x.avi' is not in"),
        ("trainlist01.txt", "v_Archery_g08_c01.avi\n", "line 1: the class of 'v_Archery_g08_c01.avi' is not in"),
    ],
)
def test_ucf101_annotations_that_do_not_fit_are_refused(ucf: Path, file: str, text: str, message: str) -> None:
    write(ucf / "ucfTrainTestlist" / file, text)
    with pytest.raises(UserError, match=message):
        ucf101.collect(SourceTree(ucf), ucf101.Ucf101Options())


def test_annotations_twice_or_not_text_are_refused(ucf: Path) -> None:
    write(ucf / "copy" / "testlist01.txt", "")
    with pytest.raises(UserError, match=r"has 2 files that may be testlist01.txt"):
        ucf101.collect(SourceTree(ucf), ucf101.Ucf101Options())
    (ucf / "copy" / "testlist01.txt").unlink()
    (ucf / "ucfTrainTestlist" / "classInd.txt").write_bytes(b"1 \xff\n")
    with pytest.raises(UserError, match=r"classInd\.txt is not UTF-8"):
        ucf101.collect(SourceTree(ucf), ucf101.Ucf101Options())


def test_folder_without_any_of_the_videos_is_refused(ucf: Path) -> None:
    (ucf / "UCF-101").rename(ucf.parent / "elsewhere")
    with pytest.raises(
        UserError, match=r"contains none of the 6 videos that the annotations name \(the first is Archery"
    ):
        ucf101.collect(SourceTree(ucf), ucf101.Ucf101Options())
    with pytest.raises(UserError, match="is not a folder"):
        ucf101.collect(SourceTree(ucf / "absent"), ucf101.Ucf101Options())


@pytest.fixture
def hmdb(tmp_path: Path) -> Path:
    root = tmp_path / "hmdb51"
    lists = root / "testTrainMulti_7030_splits"
    odd = "#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi"
    write(lists / "clap_test_split1.txt", f"{odd} 1 \na&b_clap_0.avi 2 \nsame_0.avi 0 \n")
    write(lists / "brush_hair_test_split1.txt", "x_brush_hair_0.avi 1 \nsame_0.avi 2 \ngone_0.avi 2 \n")
    write(lists / "clap_test_split2.txt", f"{odd} 2 \n")
    touch(root, f"clap/{odd}", "clap/a&b_clap_0.avi", "clap/same_0.avi", "clap/gone_0.avi")
    touch(root, "brush_hair/x_brush_hair_0.avi", "brush_hair/same_0.avi")
    return root


def test_hmdb51_official_split_tells_classes_with_equal_names_apart(hmdb: Path) -> None:
    found = hmdb51.collect(SourceTree(hmdb), hmdb51.Hmdb51Options())
    assert found.class_names == ("brush_hair", "clap")
    assert rows_of(found, hmdb) == {
        "train": [("brush_hair/x_brush_hair_0.avi", 0), ("clap/#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi", 1)],
        "test": [("brush_hair/same_0.avi", 0), ("clap/a&b_clap_0.avi", 1)],
    }
    assert found.missing == [("test", "brush_hair/gone_0.avi")]  # clap/gone_0.avi is not used instead
    assert found.left_out == {"not used in this split (tag 0)": ["clap/same_0.avi"], UNNAMED: ["clap/gone_0.avi"]}


def test_hmdb51_refuses_other_tags_and_missing_splits(hmdb: Path) -> None:
    with pytest.raises(UserError, match=r"contains no CLASS_test_split3\.txt"):
        hmdb51.collect(SourceTree(hmdb), hmdb51.Hmdb51Options(split=3))
    write(hmdb / "testTrainMulti_7030_splits" / "clap_test_split1.txt", "a.avi 1\nb.avi 3\n")
    with pytest.raises(UserError, match=r"clap_test_split1.txt, line 2: 'b.avi 3'; expected"):
        hmdb51.collect(SourceTree(hmdb), hmdb51.Hmdb51Options())


def test_folder_with_its_own_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/b/1.mp4", "train/a/deep/er/2.mkv", "train/a/notes.txt", "Validation/b/3.mp4")
    touch(tmp_path, "extra/a/4.mp4", "top.mp4", ".cache/a/5.mp4", "train/b/.6.mp4")
    found = folder.collect(SourceTree(tmp_path), folder.FolderOptions())
    assert found.class_names == ("a", "b")
    assert rows_of(found, tmp_path) == {
        "train": [("train/a/deep/er/2.mkv", 0), ("train/b/1.mp4", 1)],
        "val": [("Validation/b/3.mp4", 1)],
    }
    assert found.left_out == {"a video outside the folders of the splits": ["extra/a/4.mp4", "top.mp4"]}
    assert found.notes == ["splits are the dataset's own folders", "val has no video of 1 of 2 classes: a"]


def test_class_that_is_called_like_a_split_is_a_class(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.mp4", "bus/2.mp4", "top.mp4")
    options = folder.FolderOptions(val_share=0, test_share=0)
    found = folder.collect(SourceTree(tmp_path), options)
    assert rows_of(found, tmp_path) == {"train": [("bus/2.mp4", 0), ("train/1.mp4", 1)]}
    assert found.left_out == {"a video in no class's folder": ["top.mp4"]}


def split_by_path(root: Path, **options: Any) -> dict[str, str]:
    found = folder.collect(SourceTree(root), folder.FolderOptions(**options))
    return {path: split for split, rows in rows_of(found, root).items() for path, _ in rows}


def test_split_by_share_is_met_seeded_and_stable_when_files_are_added(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{number}.mp4" for name in "abcd" for number in range(150)))
    before = split_by_path(tmp_path, val_share=0.2, test_share=0.1)
    counts = {split: list(before.values()).count(split) for split in ("train", "val", "test")}
    assert sum(counts.values()) == 600
    # Within five standard deviations of 600 binomial draws.
    assert abs(counts["val"] - 120) < 5 * (600 * 0.2 * 0.8) ** 0.5
    assert abs(counts["test"] - 60) < 5 * (600 * 0.1 * 0.9) ** 0.5
    touch(tmp_path, *(f"{name}/more{number}.mp4" for name in "abcde" for number in range(50)))
    after = split_by_path(tmp_path, val_share=0.2, test_share=0.1)
    assert len(after) == 850
    assert {path: after[path] for path in before} == before
    assert split_by_path(tmp_path, val_share=0.2, test_share=0.1, seed=1) != after


def test_every_class_has_a_training_video_however_small(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}/{name}.mp4" for number in range(40) for name in "ab"))
    splits = split_by_path(tmp_path, val_share=0.49, test_share=0.49)
    assert {path.split("/")[0] for path, split in splits.items() if split == "train"} == {str(n) for n in range(40)}
    assert list(splits.values()).count("train") < 50


def test_every_class_with_enough_videos_is_in_every_split(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}/{name}.mp4" for number in range(60) for name in "abc"))
    touch(tmp_path, *(f"few/{name}.mp4" for name in "ab"), *(f"many/{name}.mp4" for name in range(100)))
    for shares in ((0.1, 0.1), (0.49, 0.49), (0.01, 0.9), (0.9, 0.01)):
        splits = split_by_path(tmp_path, val_share=shares[0], test_share=shares[1])
        for number in [*range(60), "many"]:
            found = {split for path, split in splits.items() if path.startswith(f"{number}/")}
            assert found == {"train", "val", "test"}, (number, shares)
    listed = rows_of(folder.collect(SourceTree(tmp_path), folder.FolderOptions()), tmp_path)
    assert all(rows == sorted(rows, key=lambda row: (row[1], row[0])) for rows in listed.values())
    splits = split_by_path(tmp_path, val_share=0.2, test_share=0)
    for number in [*range(60), "many", "few"]:
        assert {split for path, split in splits.items() if path.startswith(f"{number}/")} == {"train", "val"}


def test_classes_too_small_for_every_split_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "one/1.mp4", "two/1.mp4", "two/2.mp4", *(f"many/{name}.mp4" for name in range(30)))
    found = folder.collect(SourceTree(tmp_path), folder.FolderOptions(val_share=0.05, test_share=0.05))
    for split in ("val", "test"):
        assert f"{split} has no video of 2 of 3 classes (fewer than 3 videos each): one, two" in found.notes


def test_split_moves_only_in_classes_that_were_too_small_when_files_are_added(tmp_path: Path) -> None:
    names = [f"{label}/{number}.mp4" for label in range(20) for number in range(4)]
    touch(tmp_path, *names)
    before = split_by_path(tmp_path, val_share=0.2, test_share=0.2)
    touch(tmp_path, *(f"{label}/more{number}.mp4" for label in range(10) for number in range(40)))
    after = split_by_path(tmp_path, val_share=0.2, test_share=0.2)
    touched = {name for name in names if after[name] != before[name]}
    assert all(int(name.split("/")[0]) < 10 for name in touched)
    # In each of them, at most one video moved to test and one to val.
    assert all(sum(name.startswith(f"{label}/") for name in touched) <= 2 for label in range(10))


def test_numbered_class_folders_are_in_numeric_order_and_that_is_said(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/a.mp4" for name in ("10", "2", "1", "007")))
    found = folder.collect(SourceTree(tmp_path), folder.FolderOptions(val_share=0, test_share=0))
    assert found.class_names == ("1", "2", "007", "10")
    assert dict(rows_of(found, tmp_path)["train"]) == {
        "1/a.mp4": 0, "2/a.mp4": 1, "007/a.mp4": 2, "10/a.mp4": 3,
    }  # fmt: skip
    assert any("numeric order: 1 has label 0, 10 has label 3" in note for note in found.notes)
    touch(tmp_path, "ten/a.mp4")
    found = folder.collect(SourceTree(tmp_path), folder.FolderOptions(val_share=0, test_share=0))
    assert found.class_names == ("007", "1", "10", "2", "ten")
    assert not any("numeric order" in note for note in found.notes)


def test_videos_without_classes_become_a_list_for_pre_training(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a 1.mp4", "notes.txt")
    found = folder.collect(SourceTree(tmp_path), folder.FolderOptions())
    assert rows_of(found, tmp_path) == {"train": [("a 1.mp4", -1), ("b.mp4", -1)]}
    assert found.class_names == ()
    assert found.left_out == {}
    assert "the lists are for pre-training, every label is -1" in found.notes[0]
    assert "--val-share and --test-share have no effect" in found.notes[1]
    with pytest.raises(UserError, match=r"--class-names names.txt has no effect"):
        folder.collect(SourceTree(tmp_path), folder.FolderOptions(class_names=Path("names.txt")))


def test_splits_without_classes_become_lists_without_labels(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.mp4", "train/b.mp4", "val/c.mp4", "top.mp4")
    found = folder.collect(SourceTree(tmp_path), folder.FolderOptions())
    assert rows_of(found, tmp_path) == {
        "train": [("train/a.mp4", -1), ("train/b.mp4", -1)],
        "val": [("val/c.mp4", -1)],
    }
    assert found.left_out == {"a video outside the folders of the splits": ["top.mp4"]}


def test_video_in_no_class_of_a_split_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "train/stray.mp4", "test/a/3.mp4")
    found = folder.collect(SourceTree(tmp_path), folder.FolderOptions())
    assert found.class_names == ("a", "b")
    assert rows_of(found, tmp_path) == {
        "train": [("train/a/1.mp4", 0), ("train/b/2.mp4", 1)], "test": [("test/a/3.mp4", 0)],
    }  # fmt: skip
    assert found.left_out == {"a video in no class's folder": ["train/stray.mp4"]}


def test_folder_without_videos_and_shares_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    with pytest.raises(UserError, match=r"contains no video: no file .* ends in one of .*\.mp4"):
        folder.collect(SourceTree(tmp_path), folder.FolderOptions())
    with pytest.raises(UserError, match="leave no video for training"):
        folder.FolderOptions(val_share=0.5, test_share=0.5)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="must be from 0 to below 1"):
            folder.FolderOptions(val_share=share)


def test_names_that_no_list_can_hold_are_left_out_and_told(tmp_path: Path) -> None:
    touch(tmp_path, "a/good.mp4", "a/line\nbreak.mp4", "a/" + os.fsdecode(b"\xfc.mp4"), "ü a/1,2 3.mp4")
    found = folder.collect(SourceTree(tmp_path), folder.FolderOptions(val_share=0, test_share=0))
    assert rows_of(found, tmp_path) == {"train": [("a/good.mp4", 0), ("ü a/1,2 3.mp4", 1)]}
    assert found.left_out == {UNLISTABLE: ["'a/line\\nbreak.mp4'", "'a/\\udcfc.mp4'"]}


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "disk/1.mp4", "data/b/2.mp4")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "b" / "loop").symlink_to(tmp_path / "data")
    found = folder.collect(SourceTree(tmp_path / "data"), folder.FolderOptions(val_share=0, test_share=0))
    assert rows_of(found, tmp_path / "data") == {"train": [("a/1.mp4", 0), ("b/2.mp4", 1)]}
