"""Importers of Kinetics, SSv2 and OSCC on miniature copies; files are empty because only names are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everest_ds.data.importers import kinetics, oscc, ssv2
from everest_ds.data.importers.collector import CONTRADICTED, NO_WINDOW, REPEATED, UNNAMED
from everest_ds.data.importers.source_tree import SourceTree
from everest_ds.errors import UserError
from tests.unit.data.importers.layouts import rows_of, touch, write


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
    found = kinetics.collect(SourceTree(k400), kinetics.KineticsOptions())
    assert found.class_names == ("riding a bike", "zumba")
    assert rows_of(found, k400) == {
        "train": [("train/zumba/aaaaaaaaaa1_000001_000011.mp4", 1), ("train/riding_a_bike/-baaaaaaaa2.mkv", 0)],
        "val": [("val/_caaaaaaaa4_000000_000010.mp4", 1)],
        "test": [("test/ddddddddddd_000003_000013.mp4", -1)],
    }
    assert found.missing == [("train", "zumba/gone_____03_000005_000015")]
    assert found.left_out == {UNNAMED: ["val/AAAAAAAAAA1_000001_000011.mp4"]}  # identifiers are case-sensitive
    assert found.notes == ["1 videos of test have no label (-1); they cannot be scored"]


def test_kinetics_takes_the_copy_in_the_splits_folder_and_tells_of_copies(k400: Path) -> None:
    touch(k400, "a/zumba/aaaaaaaaaa1_000001_000011.mp4", "a/_caaaaaaaa4_000000_000010.mp4")
    touch(k400, "b/ddddddddddd_000003_000013.mp4", "b2/ddddddddddd_000003_000013.mp4")
    (k400 / "test" / "ddddddddddd_000003_000013.mp4").unlink()
    found = kinetics.collect(SourceTree(k400), kinetics.KineticsOptions())
    paths = {path for rows in rows_of(found, k400).values() for path, _ in rows}
    assert paths >= {"train/zumba/aaaaaaaaaa1_000001_000011.mp4", "val/_caaaaaaaa4_000000_000010.mp4"}
    assert "b/ddddddddddd_000003_000013.mp4" in paths
    assert "1 names have several files; the first by path is listed, the others are left out" in found.notes
    assert len(found.left_out[UNNAMED]) == 4


def test_kinetics_orders_classes_by_a_file_that_must_name_them_all(k400: Path, tmp_path: Path) -> None:
    write(tmp_path / "names.txt", "zumba\nyoga\nriding a bike\n")
    options = kinetics.KineticsOptions(class_names=tmp_path / "names.txt")
    found = kinetics.collect(SourceTree(k400), options)
    assert found.class_names == ("zumba", "yoga", "riding a bike")
    assert [label for _, label in rows_of(found, k400)["train"]] == [0, 2]
    write(tmp_path / "names.txt", "zumba\nyoga\n")
    with pytest.raises(UserError, match="lacks 1 classes of the dataset, the first is 'riding a bike'"):
        kinetics.collect(SourceTree(k400), options)


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
        ("all.csv", "label,youtube_id,time_start,time_end\na,x,1,2\n", "line 2 has no split"),
        ("train.csv", "label,youtube_id,time_start,time_end,split\na,x,1,2,dev\n", "line 2 has no split"),
    ],
)
def test_kinetics_rows_that_cannot_be_understood_are_refused(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path / name, text)
    with pytest.raises(UserError, match=message):
        kinetics.collect(SourceTree(tmp_path), kinetics.KineticsOptions())


def test_kinetics_needs_annotations_and_rows_named_twice_are_listed_once(k400: Path, tmp_path: Path) -> None:
    text = "label,youtube_id,time_start,time_end\nzumba,aaaaaaaaaa1,1,11\nyoga,aaaaaaaaaa1,1,11\n"
    write(k400 / "annotations" / "train_more.csv", text + "zumba,gone_____03,5,15\n")
    found = kinetics.collect(SourceTree(k400), kinetics.KineticsOptions())
    name = "aaaaaaaaaa1_000001_000011"
    assert found.left_out[REPEATED] == [f"train zumba/{name}"]
    assert found.left_out[CONTRADICTED] == [f"train yoga/{name}"]
    assert len(found.rows["train"]) == 2
    assert len(found.missing) == 1
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"contains no .csv with the columns youtube_id, time_start, time_end"):
        kinetics.collect(SourceTree(k400), kinetics.KineticsOptions(annotations=tmp_path / "none"))


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
    found = ssv2.collect(SourceTree(something), ssv2.Ssv2Options())
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
    found = ssv2.collect(SourceTree(something), ssv2.Ssv2Options())
    assert rows_of(found, something / "20bn-something-something-v2")["test"] == [("9.webm", 0)]
    assert found.notes == ["validation.json is missing, so there is no list for val"]
    assert found.left_out == {UNNAMED: ["20bn-something-something-v2/8.webm"]}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.json", [{"id": "7"}], r"entry 1 has no 'template'; expected id, template, got id"),
        ("train.json", [{"template": "Pouring [something]"}], "entry 1 has no 'id'"),
        ("train.json", [{"id": "7", "template": "Eating [something]"}], r"entry 1: .* is not in labels.json"),
        ("train.json", {"id": "7"}, "expected a list of videos, got dict"),
        ("train.json", ["7"], "entry 1: expected an object with id, template, got '7'"),
        ("train.json", '[{"id": ', "is not JSON: .* in line 1"),
        ("labels.json", {"a": "0", "b": "2"}, "expected the labels 0 to 1"),
        ("labels.json", ["a"], "expected an object like"),
    ],
)
def test_ssv2_annotations_that_do_not_fit_are_refused(
    something: Path, file: str, content: Any, message: str
) -> None:
    write(something / "labels" / file, content)
    with pytest.raises(UserError, match=message):
        ssv2.collect(SourceTree(something), ssv2.Ssv2Options())


def clip(number: int, video: str, start: float, end: float, **changes: Any) -> dict[str, Any]:
    """Return a clip in the format of the annotations."""
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
    found = oscc.collect(SourceTree(ego), oscc.OsccOptions())
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
    assert found.notes[0] == "fho_oscc-pnr_val.json is missing, so there is no list for val"
    assert found.notes[1] == ("clips found: 4 in whole videos by seconds, 1 in clips by seconds, 1 cut already")


@pytest.mark.parametrize("key", ["unique_id", "video_uid", "parent_start_sec", "parent_end_sec", "state_change"])
def test_oscc_names_the_key_that_is_missing(ego: Path, key: str) -> None:
    broken = {name: value for name, value in clip(1, "v1", 12.0, 20.0).items() if name != key}
    write(ego / "annotations" / "fho_oscc-pnr_train.json", [clip(1, "v1", 12.0, 20.0), broken])
    with pytest.raises(UserError, match=rf"fho_oscc-pnr_train.json, entry 2 has no '{key}'; expected"):
        oscc.collect(SourceTree(ego), oscc.OsccOptions())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"videos": []}, "expected a list of clips, got dict without 'clips'"),
        ("7", "expected a list of clips, got int"),
        ([clip(1, "v1", 0, 8, state_change="yes")], "entry 1: state_change='yes'; expected true or false"),
        ([clip(1, "v1", 0, 8, parent_end_sec=None)], "entry 1: .*parent_end_sec=None; expected seconds"),
    ],
)
def test_oscc_values_that_cannot_be_understood_are_refused(ego: Path, content: Any, message: str) -> None:
    write(ego / "annotations" / "fho_oscc-pnr_train.json", content)
    with pytest.raises(UserError, match=message):
        oscc.collect(SourceTree(ego), oscc.OsccOptions())


def test_oscc_needs_annotations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no fho_oscc-pnr_train\.json"):
        oscc.collect(SourceTree(tmp_path), oscc.OsccOptions())
