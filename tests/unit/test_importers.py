"""Importers on miniature copies of each dataset's layout; files are empty, since only names are looked at."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from everest_ds.data.importers import folder, hmdb51, kinetics, oscc, ssv2, ucf101
from everest_ds.data.importers.gathering import CONTRADICTED, NO_WINDOW, REPEATED, UNLISTABLE, UNNAMED, Import
from everest_ds.data.importers.tree import SourceTree
from everest_ds.errors import UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def rows_of(found: Import, root: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Rows as (path below the root, label), and the window where there is one."""
    return {
        split: [
            (str(row.path.relative_to(root)), row.label, *(() if row.start_s is None else (row.start_s, row.end_s)))
            for row in rows
        ]
        for split, rows in found.rows.items()
    }


# --- UCF101


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    """Three classes as downloaded; in reality, too, a folder is spelt unlike its videos."""
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
    found = ucf101.gather(SourceTree(ucf), ucf101.Ucf101Options())
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
    assert found.notes == ["1 classes are scored and have no training video, e.g. HandstandPushups"]


def test_ucf101_other_split_elsewhere_and_reencoded_videos(ucf: Path, tmp_path: Path) -> None:
    lists = (ucf / "ucfTrainTestlist").rename(tmp_path / "lists")
    for path in (ucf / "UCF-101").glob("*/v_*.avi"):
        path.rename(path.with_suffix(".MP4"))
    with pytest.raises(UserError, match=r"holds no classInd.txt; .* --annotations"):
        ucf101.gather(SourceTree(ucf), ucf101.Ucf101Options(split=2))
    found = ucf101.gather(SourceTree(ucf), ucf101.Ucf101Options(split=2, annotations=lists))
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
            r"line 1: .* is of class 2, but Archery is number 1",
        ),
        ("testlist01.txt", "\nSwimming/v_x.avi\n", "line 2: 'Swimming/v_x.avi' is of no class"),
        ("trainlist01.txt", "v_Archery_g08_c01.avi\n", "line 1: 'v_Archery_g08_c01.avi' is of no class"),
    ],
)
def test_ucf101_annotations_that_do_not_fit_are_refused(ucf: Path, file: str, text: str, message: str) -> None:
    write(ucf / "ucfTrainTestlist" / file, text)
    with pytest.raises(UserError, match=message):
        ucf101.gather(SourceTree(ucf), ucf101.Ucf101Options())


def test_annotations_twice_or_not_text_are_refused(ucf: Path) -> None:
    write(ucf / "copy" / "testlist01.txt", "")
    with pytest.raises(UserError, match=r"holds 2 files that may be testlist01.txt"):
        ucf101.gather(SourceTree(ucf), ucf101.Ucf101Options())
    (ucf / "copy" / "testlist01.txt").unlink()
    (ucf / "ucfTrainTestlist" / "classInd.txt").write_bytes(b"1 \xff\n")
    with pytest.raises(UserError, match=r"classInd\.txt is not UTF-8"):
        ucf101.gather(SourceTree(ucf), ucf101.Ucf101Options())


def test_folder_without_any_of_the_videos_is_refused(ucf: Path) -> None:
    (ucf / "UCF-101").rename(ucf.parent / "elsewhere")
    with pytest.raises(
        UserError, match=r"holds none of the 6 videos that the annotations name \(the first is Archery"
    ):
        ucf101.gather(SourceTree(ucf), ucf101.Ucf101Options())
    with pytest.raises(UserError, match="is no folder"):
        SourceTree(ucf / "absent")


# --- HMDB51


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
    found = hmdb51.gather(SourceTree(hmdb), hmdb51.Hmdb51Options())
    assert found.class_names == ("brush_hair", "clap")
    assert rows_of(found, hmdb) == {
        "train": [("brush_hair/x_brush_hair_0.avi", 0), ("clap/#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi", 1)],
        "test": [("brush_hair/same_0.avi", 0), ("clap/a&b_clap_0.avi", 1)],
    }
    assert found.missing == [("test", "brush_hair/gone_0.avi")]  # another class's video is no substitute
    assert found.left_out == {"not used in this split (tag 0)": ["clap/same_0.avi"], UNNAMED: ["clap/gone_0.avi"]}


def test_hmdb51_refuses_other_tags_and_missing_splits(hmdb: Path) -> None:
    with pytest.raises(UserError, match=r"holds no CLASS_test_split3\.txt"):
        hmdb51.gather(SourceTree(hmdb), hmdb51.Hmdb51Options(split=3))
    write(hmdb / "testTrainMulti_7030_splits" / "clap_test_split1.txt", "a.avi 1\nb.avi 3\n")
    with pytest.raises(UserError, match=r"clap_test_split1.txt, line 2: 'b.avi 3'; expected"):
        hmdb51.gather(SourceTree(hmdb), hmdb51.Hmdb51Options())


# --- Kinetics


@pytest.fixture
def k400(tmp_path: Path) -> Path:
    root = tmp_path / "k400"
    train = "label,youtube_id,time_start,time_end,split,is_cc\nzumba,aaaaaaaaaa1,1,11,train,0\n"
    train += '"riding a bike",-baaaaaaaa2,84.0,94.0,train,0\nzumba,gone_____03,5,15,train,0\n'
    write(root / "annotations" / "train.csv", train)
    val = "label,youtube_id,time_start,time_end,split\nzumba,_caaaaaaaa4,0,10,validate\n"
    write(root / "annotations" / "val.csv", val)
    write(
        root / "annotations" / "kinetics_test.csv", "\ufeffyoutube_id,time_start,time_end\r\nddddddddddd,3,13\r\n"
    )
    (root / "other.csv").write_bytes(b"latin \xff,1\n")
    touch(root / "train", "zumba/aaaaaaaaaa1_000001_000011.mp4", "riding_a_bike/-baaaaaaaa2.mkv")
    touch(root, "val/_caaaaaaaa4_000000_000010.mp4", "test/ddddddddddd_000003_000013.mp4")
    touch(root, "val/AAAAAAAAAA1_000001_000011.mp4")
    return root


def test_kinetics_reports_what_was_not_downloaded(k400: Path) -> None:
    found = kinetics.gather(SourceTree(k400), kinetics.KineticsOptions())
    assert found.class_names == ("riding a bike", "zumba")
    assert rows_of(found, k400) == {
        "train": [("train/zumba/aaaaaaaaaa1_000001_000011.mp4", 1), ("train/riding_a_bike/-baaaaaaaa2.mkv", 0)],
        "val": [("val/_caaaaaaaa4_000000_000010.mp4", 1)],
        "test": [("test/ddddddddddd_000003_000013.mp4", -1)],
    }
    assert found.missing == [("train", "zumba/gone_____03_000005_000015")]
    assert found.left_out == {
        UNNAMED: ["val/AAAAAAAAAA1_000001_000011.mp4"]
    }  # identifiers know upper and lower case
    assert found.notes == ["1 videos of test have no label (-1); they cannot be scored"]


def test_kinetics_takes_the_copy_in_the_splits_folder_and_tells_of_copies(k400: Path) -> None:
    touch(k400, "a/zumba/aaaaaaaaaa1_000001_000011.mp4", "a/_caaaaaaaa4_000000_000010.mp4")
    touch(k400, "b/ddddddddddd_000003_000013.mp4", "b2/ddddddddddd_000003_000013.mp4")
    (k400 / "test" / "ddddddddddd_000003_000013.mp4").unlink()
    found = kinetics.gather(SourceTree(k400), kinetics.KineticsOptions())
    paths = {path for rows in rows_of(found, k400).values() for path, _ in rows}
    assert paths >= {"train/zumba/aaaaaaaaaa1_000001_000011.mp4", "val/_caaaaaaaa4_000000_000010.mp4"}
    assert "b/ddddddddddd_000003_000013.mp4" in paths
    assert "1 names have several files; the first by path is listed, the others are left out" in found.notes
    assert len(found.left_out[UNNAMED]) == 4


def test_kinetics_orders_classes_by_a_file_that_must_name_them_all(k400: Path, tmp_path: Path) -> None:
    write(tmp_path / "names.txt", "zumba\nyoga\nriding a bike\n")
    options = kinetics.KineticsOptions(class_names=tmp_path / "names.txt")
    found = kinetics.gather(SourceTree(k400), options)
    assert found.class_names == ("zumba", "yoga", "riding a bike")
    assert [label for _, label in rows_of(found, k400)["train"]] == [0, 2]
    write(tmp_path / "names.txt", "zumba\nyoga\n")
    with pytest.raises(
        UserError, match="does not name 1 classes that the dataset has, the first is 'riding a bike'"
    ):
        kinetics.gather(SourceTree(k400), options)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "train.csv",
            "label,youtube_id,time_start,time_end\na,x,one,2\n",
            "line 2: expected time_start and time_end",
        ),
        ("train.csv", "label,youtube_id,time_start,time_end\na,x,1\n", "line 2: expected time_start and time_end"),
        ("train.csv", "label,youtube_id,time_start,time_end\na,,1,2\n", "line 2 has no youtube_id"),
        ("all.csv", "label,youtube_id,time_start,time_end\na,x,1,2\n", "line 2 says of no split"),
        ("train.csv", "label,youtube_id,time_start,time_end,split\na,x,1,2,dev\n", "line 2 says of no split"),
    ],
)
def test_kinetics_rows_that_cannot_be_understood_are_refused(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path / name, text)
    with pytest.raises(UserError, match=message):
        kinetics.gather(SourceTree(tmp_path), kinetics.KineticsOptions())


def test_kinetics_needs_annotations_and_rows_named_twice_are_listed_once(k400: Path, tmp_path: Path) -> None:
    text = "label,youtube_id,time_start,time_end\nzumba,aaaaaaaaaa1,1,11\nyoga,aaaaaaaaaa1,1,11\n"
    write(k400 / "annotations" / "train_more.csv", text + "zumba,gone_____03,5,15\n")
    found = kinetics.gather(SourceTree(k400), kinetics.KineticsOptions())
    name = "aaaaaaaaaa1_000001_000011"
    assert found.left_out[REPEATED] == [f"train zumba/{name}"]
    assert found.left_out[CONTRADICTED] == [f"train yoga/{name}"]
    assert len(found.rows["train"]) == 2
    assert len(found.missing) == 1
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"holds no .csv with the columns youtube_id, time_start, time_end"):
        kinetics.gather(SourceTree(k400), kinetics.KineticsOptions(annotations=tmp_path / "none"))


# --- Something-Something v2

TEMPLATES = {"Pouring something into something": "1", "Approaching something with your camera": "0"}


@pytest.fixture
def something(tmp_path: Path) -> Path:
    root = tmp_path / "ssv2"
    write(root / "labels" / "labels.json", TEMPLATES)
    pouring = {"id": "78687", "label": "pouring tea", "template": "Pouring [something] into [something]"}
    camera = {"id": 7, "template": "Approaching [something] with your camera", "placeholders": ["a cup"]}
    write(root / "labels" / "train.json", [pouring, camera])
    write(root / "labels" / "validation.json", [{**pouring, "id": "8"}, {**camera, "id": "99"}])
    write(root / "labels" / "test.json", [{"id": "9"}])
    touch(root / "20bn-something-something-v2", "78687.webm", "7.webm", "8.webm", "9.webm")
    return root


def test_ssv2_takes_templates_as_classes(something: Path) -> None:
    found = ssv2.gather(SourceTree(something), ssv2.Ssv2Options())
    assert found.class_names == ("Approaching something with your camera", "Pouring something into something")
    assert rows_of(found, something / "20bn-something-something-v2") == {
        "train": [("78687.webm", 1), ("7.webm", 0)],
        "val": [("8.webm", 1)],
        "test": [("9.webm", -1)],
    }
    assert found.missing == [("val", "99")]
    assert found.notes == ["1 videos of test have no label (-1); they cannot be scored"]


def test_ssv2_takes_the_older_names_and_the_answers_of_the_test(something: Path) -> None:
    for path in (something / "labels").iterdir():
        path.rename(path.with_name(f"something-something-v2-{path.name}"))
    (something / "labels" / "something-something-v2-validation.json").unlink()
    write(something / "labels" / "test-answers.csv", "9;Approaching something with your camera\n")
    found = ssv2.gather(SourceTree(something), ssv2.Ssv2Options())
    assert rows_of(found, something / "20bn-something-something-v2")["test"] == [("9.webm", 0)]
    assert found.notes == ["there is no validation.json, so no list for val"]
    assert found.left_out == {UNNAMED: ["20bn-something-something-v2/8.webm"]}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.json", [{"id": "7"}], r"entry 1 has no 'template'; expected id, template, got id"),
        ("train.json", [{"template": "Pouring [something]"}], "entry 1 has no 'id'"),
        ("train.json", [{"id": "7", "template": "Eating [something]"}], r"entry 1: .* is no class of labels.json"),
        ("train.json", {"id": "7"}, "expected a list of videos, got dict"),
        ("train.json", ["7"], "entry 1: expected an object with id, template, got '7'"),
        ("train.json", '[{"id": ', "is no JSON: .* in line 1"),
        ("labels.json", {"a": "0", "b": "2"}, "expected the labels 0 to 1"),
        ("labels.json", ["a"], "expected an object like"),
    ],
)
def test_ssv2_annotations_that_do_not_fit_are_refused(
    something: Path, file: str, content: Any, message: str
) -> None:
    write(something / "labels" / file, content)
    with pytest.raises(UserError, match=message):
        ssv2.gather(SourceTree(something), ssv2.Ssv2Options())


# --- Ego4D OSCC


def clip(number: int, video: str, start: float, end: float, **changes: Any) -> dict[str, Any]:
    """A clip as the annotations have it."""
    own = {"unique_id": f"u{number}", "video_uid": video, "parent_start_sec": start, "parent_end_sec": end}
    own |= {"clip_uid": f"c{number}", "clip_start_sec": 1.5, "clip_end_sec": 9.5, "state_change": True}
    return own | changes


@pytest.fixture
def ego(tmp_path: Path) -> Path:
    root = tmp_path / "ego4d"
    train = [
        clip(1, "v1", 12.0, 20.0),
        clip(2, "v1", 20.0, 28.0, state_change=False),
        clip(3, "v3", 0, 8.0000001),
        clip(4, "v4", 3.5, 11.5),
        clip(5, "v5", 3.5, 11.5),
        clip(6, "v1", -0.25, 7.75),
    ]
    write(root / "annotations" / "fho_oscc-pnr_train.json", {"version": "1.0", "split": "train", "clips": train})
    test = {key: value for key, value in clip(7, "v1", 100, 108).items() if key != "state_change"}
    write(root / "annotations" / "fho_oscc-pnr_test_unannotated.json", {"clips": [test]})
    touch(root, "full_scale/v1.mp4", "clips/c3.mp4", "cut/u4.mp4", "full_scale/v4.mp4")
    return root


def test_oscc_cuts_clips_by_seconds(ego: Path) -> None:
    found = oscc.gather(SourceTree(ego), oscc.OsccOptions())
    assert found.class_names == ("no state change", "state change")
    assert rows_of(found, ego) == {
        "train": [
            ("full_scale/v1.mp4", 1, 12.0, 20.0),
            ("full_scale/v1.mp4", 0, 20.0, 28.0),
            ("clips/c3.mp4", 1, 1.5, 9.5),
            ("cut/u4.mp4", 1),
        ],
        "test": [("full_scale/v1.mp4", -1, 100.0, 108.0)],
    }
    assert found.missing == [("train", "u5")]
    assert found.left_out == {NO_WINDOW: ["u6 -0.25 7.75"], UNNAMED: ["full_scale/v4.mp4"]}
    assert found.notes[0] == "there is no fho_oscc-pnr_val file, so no list for val"
    assert found.notes[1] == ("clips found: 4 in whole videos by seconds, 1 in clips by seconds, 1 cut already")


@pytest.mark.parametrize("key", ["unique_id", "video_uid", "parent_start_sec", "parent_end_sec", "state_change"])
def test_oscc_names_the_key_that_is_missing(ego: Path, key: str) -> None:
    broken = {name: value for name, value in clip(1, "v1", 12.0, 20.0).items() if name != key}
    write(ego / "annotations" / "fho_oscc-pnr_train.json", [clip(1, "v1", 12.0, 20.0), broken])
    with pytest.raises(UserError, match=rf"fho_oscc-pnr_train.json, entry 2 has no '{key}'; expected"):
        oscc.gather(SourceTree(ego), oscc.OsccOptions())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"videos": []}, "has no 'clips'"),
        ("7", "expected a list of clips, got int"),
        ([clip(1, "v1", 0, 8, state_change="yes")], "entry 1: state_change='yes'; expected true or false"),
        ([clip(1, "v1", 0, 8, parent_end_sec=None)], "entry 1: .*parent_end_sec=None; expected seconds"),
    ],
)
def test_oscc_values_that_cannot_be_understood_are_refused(ego: Path, content: Any, message: str) -> None:
    write(ego / "annotations" / "fho_oscc-pnr_train.json", content)
    with pytest.raises(UserError, match=message):
        oscc.gather(SourceTree(ego), oscc.OsccOptions())


def test_oscc_needs_annotations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no fho_oscc-pnr_train\.json"):
        oscc.gather(SourceTree(tmp_path), oscc.OsccOptions())


# --- folders of classes


def test_folder_with_its_own_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/b/1.mp4", "train/a/deep/er/2.mkv", "train/a/notes.txt", "Validation/b/3.mp4")
    touch(tmp_path, "extra/a/4.mp4", "top.mp4", ".cache/a/5.mp4", "train/b/.6.mp4")
    found = folder.gather(SourceTree(tmp_path), folder.FolderOptions())
    assert found.class_names == ("a", "b")
    assert rows_of(found, tmp_path) == {
        "train": [("train/a/deep/er/2.mkv", 0), ("train/b/1.mp4", 1)],
        "val": [("Validation/b/3.mp4", 1)],
    }
    assert found.left_out == {"a video outside the folders of the splits": ["extra/a/4.mp4", "top.mp4"]}
    assert found.notes == ["splits are the dataset's own folders"]


def test_class_that_is_called_like_a_split_is_a_class(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.mp4", "bus/2.mp4", "top.mp4")
    options = folder.FolderOptions(val_share=0, test_share=0)
    found = folder.gather(SourceTree(tmp_path), options)
    assert rows_of(found, tmp_path) == {"train": [("bus/2.mp4", 0), ("train/1.mp4", 1)]}
    assert found.left_out == {"a video in no class's folder": ["top.mp4"]}


def split_by_path(root: Path, **options: Any) -> dict[str, str]:
    found = folder.gather(SourceTree(root), folder.FolderOptions(**options))
    return {path: split for split, rows in rows_of(found, root).items() for path, _ in rows}


def test_split_by_share_is_met_seeded_and_stable_when_files_are_added(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{number}.mp4" for name in "abcd" for number in range(150)))
    before = split_by_path(tmp_path, val_share=0.2, test_share=0.1)
    counts = {split: list(before.values()).count(split) for split in ("train", "val", "test")}
    assert sum(counts.values()) == 600
    # Five standard deviations of a binomial draw of 600.
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


def test_folder_without_classes_and_shares_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.mp4")
    with pytest.raises(UserError, match="holds no CLASS/video"):
        folder.gather(SourceTree(tmp_path), folder.FolderOptions())
    with pytest.raises(UserError, match="leave nothing for training"):
        folder.FolderOptions(val_share=0.5, test_share=0.5)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="must be from 0 to below 1"):
            folder.FolderOptions(val_share=share)


def test_names_that_no_list_can_hold_are_left_out_and_told(tmp_path: Path) -> None:
    touch(tmp_path, "a/good.mp4", "a/line\nbreak.mp4", "a/" + os.fsdecode(b"\xfc.mp4"), "ü a/1,2 3.mp4")
    found = folder.gather(SourceTree(tmp_path), folder.FolderOptions(val_share=0, test_share=0))
    assert rows_of(found, tmp_path) == {"train": [("a/good.mp4", 0), ("ü a/1,2 3.mp4", 1)]}
    assert found.left_out == {UNLISTABLE: ["'a/line\\nbreak.mp4'", "'a/\\udcfc.mp4'"]}


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "disk/1.mp4", "data/b/2.mp4")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "b" / "loop").symlink_to(tmp_path / "data")
    found = folder.gather(SourceTree(tmp_path / "data"), folder.FolderOptions(val_share=0, test_share=0))
    assert rows_of(found, tmp_path / "data") == {"train": [("a/1.mp4", 0), ("b/2.mp4", 1)]}
