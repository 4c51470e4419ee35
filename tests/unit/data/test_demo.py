from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from everest_ds.data import demo
from everest_ds.data.demo import (
    MOTIONS,
    TEXTURES,
    DemoConfig,
    Shape,
    draw_background,
    draw_discs,
    make_generator,
    render,
    render_video,
    write_demo_data,
)
from everest_ds.data.lists.video_list import read_list
from everest_ds.data.readers.video import Video
from everest_ds.errors import UserError

SMALL = DemoConfig(train=9, val=2, test=0, num_frames=6)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_dataset_repeats_byte_for_byte_and_changes_with_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_demo_data(tmp_path / name, DemoConfig(train=9, val=2, test=0, num_frames=6, seed=seed))
    first, again, other = (hashes(tmp_path / name) for name in "abc")
    assert first == again
    videos = [name for name in first if name.endswith(".mp4")]
    assert len(videos) == 11
    assert all(first[name] != other[name] for name in videos)


def test_equal_frames_give_equal_bytes(tmp_path: Path) -> None:
    """With x264's macroblock tree, 60 encodings of this video gave six different files."""
    frames = render_video(DemoConfig(num_frames=6), "train", 1)
    variants = set()
    for _ in range(60):
        demo.encode_h264(tmp_path / "video.mp4", frames)
        variants.add((tmp_path / "video.mp4").read_bytes())
    assert len(variants) == 1


def test_lists_name_readable_videos_with_balanced_labels(tmp_path: Path) -> None:
    lists = write_demo_data(tmp_path / "demo", SMALL)
    assert [path.name for path in lists] == ["train.csv", "val.csv"]
    rows = read_list(lists[0])
    assert [row.label for row in rows] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert all(Video(row.path).num_frames == 6 for row in rows)
    assert (tmp_path / "demo" / "classes.txt").read_text().split() == list(MOTIONS)


def test_movers_drift_by_the_velocity_of_the_class_and_nothing_else_moves() -> None:
    """Oracle: where two frames differ, every pixel of a mover is found again, shifted by the velocity."""
    config = DemoConfig(train=8, num_frames=5, movers=1, distractors=1)
    for label in range(len(list(MOTIONS))):
        frames = render_video(config, "train", label).astype(int)
        down, right = list(MOTIONS.values())[label]
        assert abs(down) + abs(right) in (1, 2)
        background = np.median(render_video(config, "train", label), axis=0)
        for t in range(1, 5):
            changed = np.abs(frames[t] - frames[0]).max(axis=2) > 0
            assert 0 < changed.sum() < 0.35 * changed.size
        # A pixel well inside the mover must be found again, shifted.
        moving = np.abs(frames[0] - background).max(axis=2) > 0
        rows, cols = np.nonzero(moving)
        shifted = frames[1][(rows + down) % config.size, (cols + right) % config.size]
        agree = (np.abs(shifted - frames[0][rows, cols]).max(axis=1) == 0).mean()
        assert agree > 0.5


def scene(config: DemoConfig, label: int, number: int = 0) -> tuple[np.ndarray, list[Shape]]:
    """Return background and discs of a training video with its own draws but a chosen class."""
    generator = make_generator(config, "train", number)
    return draw_background(generator, config), draw_discs(generator, config, label)


@pytest.mark.parametrize("classes", ["motion", "mover"])
def test_no_single_frame_gives_the_class_away(classes: Any) -> None:
    """A video of any other class can start with exactly the last frame of this class's video.

    Positions are uniform on the wrapped frame, so drift does not change their distribution. Textures, colours and
    order do not depend on the class. So all classes are equally likely, given a frame.
    """
    config = movers(num_frames=7) if classes == "mover" else DemoConfig(train=8, num_frames=7, movers=2)
    reached = render_video(config, "train", 0)[6]
    drifted = [
        tuple(start + 6 * speed for start, speed in zip(disc.corner, disc.velocity, strict=True))
        for disc in scene(config, 0)[1]
    ]
    for label in range(1, len(config.class_names)):
        background, discs = scene(config, label)
        moved = [replace(disc, corner=corner) for disc, corner in zip(discs, drifted, strict=True)]
        assert np.array_equal(render(background, moved, 2)[0], reached)
        assert not np.array_equal(render(background, moved, 2)[1], render_video(config, "train", 0)[0])


def test_finished_dataset_is_left_alone_and_another_is_not_overwritten(tmp_path: Path) -> None:
    write_demo_data(tmp_path / "demo", SMALL)
    stamp = (tmp_path / "demo" / "train" / "00000.mp4").stat().st_mtime_ns
    write_demo_data(tmp_path / "demo", SMALL)
    assert (tmp_path / "demo" / "train" / "00000.mp4").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="made with other settings"):
        write_demo_data(tmp_path / "demo", DemoConfig(train=9, val=2, test=0, num_frames=7))


def test_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        write_demo_data(tmp_path, SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {"train": 0},
        {"val": -1},
        {"size": 63},
        {"size": 20},
        {"radius": 0},
        {"num_frames": 0},
        {"clutter": -1},
        {"shake": -1},
        {"gop": 0},
        {"width": 65},
        {"width": 20},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(UserError):
        DemoConfig(**change)


def movers(**changes: Any) -> DemoConfig:
    fixed = {"classes": "mover", "movers": 1, "distractors": 1, "radius": 8, "num_frames": 5, "clutter": 4}
    return DemoConfig(**(fixed | changes))


def test_first_frame_does_not_depend_on_which_texture_moves_but_later_ones_do() -> None:
    videos = [render(*scene(movers(), label), 2) for label in range(len(TEXTURES))]
    assert np.array_equal(videos[0], render_video(movers(), "train", 0)[:2])
    assert all(np.array_equal(video[0], videos[0][0]) for video in videos)
    assert all(not np.array_equal(video[1], videos[0][1]) for video in videos[1:])


def test_every_texture_is_drawn_equally_often() -> None:
    for number in range(20):
        discs = scene(movers(movers=2, distractors=0), 0, number)[1]
        assert sorted(disc.texture for disc in discs) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("label", range(len(TEXTURES)))
def test_only_discs_of_the_class_move_and_each_keeps_its_way(label: int) -> None:
    """Oracle: if nothing covers a mover, its pixels are found again, shifted by its velocity."""
    discs = scene(movers(radius=6, distractors=0), label)[1]
    assert [disc.texture for disc in discs if disc.velocity != (0, 0)] == [label]
    mover = next(disc for disc in discs if disc.texture == label)
    frames = render(np.zeros((64, 64, 3), dtype=np.uint8), [mover], 3)
    rows, cols = np.nonzero(frames[0].any(axis=2))
    assert len(rows) > 50
    down, right = mover.velocity
    moved = frames[2][(rows + 2 * down) % 64, (cols + 2 * right) % 64]
    assert np.array_equal(moved, frames[0][rows, cols])
    others = [disc for disc in discs if disc.texture != label]
    still = render(np.zeros((64, 64, 3), dtype=np.uint8), others, 3)
    assert still.any()
    assert np.array_equal(still[0], still[2])


@pytest.mark.parametrize("texture", range(len(TEXTURES)))
def test_textures_repeat_every_four_pixels_along_their_own_directions(texture: int) -> None:
    disc = next(one for one in scene(movers(radius=12), 0, number=3)[1] if one.texture == texture)
    rows, cols = np.nonzero(disc.mask_EE1[:, :, 0])
    inside = set(zip(rows.tolist(), cols.tolist(), strict=True))

    def same(down: int, right: int) -> bool:
        pairs = [((r, c), (r + down, c + right)) for r, c in inside if (r + down, c + right) in inside]
        return all(np.array_equal(disc.image_EEC[a], disc.image_EEC[b]) for a, b in pairs)

    assert same(4, 0)
    assert same(0, 4)
    expected = {
        "rows": [(0, 1)], "columns": [(1, 0)], "diagonal": [(1, -1)], "checks": [(2, 2), (2, -2)],
    }  # fmt: skip
    steps = [(0, 1), (1, 0), (1, -1), (2, 2), (2, -2)]
    found = [step for step in steps if same(*step)]
    assert set(expected[TEXTURES[texture]]) <= set(found)
    assert not {(0, 1), (1, 0), (1, -1)} & set(found) - set(expected[TEXTURES[texture]])


def test_no_drift_of_a_tubelet_is_a_whole_period_of_the_textures() -> None:
    assert len(set(demo.VELOCITIES)) == 8
    assert all((2 * down) % 4 or (2 * right) % 4 for down, right in demo.VELOCITIES)


def test_clutter_and_shake_work_for_both_kinds_of_classes() -> None:
    for classes in ("motion", "mover"):
        plain = DemoConfig(num_frames=6, classes=classes, movers=1, radius=6)
        cluttered, shaken = replace(plain, clutter=20), replace(plain, shake=3)
        still = render_video(plain, "train", 1)
        assert not np.array_equal(render_video(cluttered, "train", 1)[0], still[0])
        for frame, moved in zip(still, render_video(shaken, "train", 1), strict=True):
            found = [
                (down, right)
                for down in range(-3, 4)
                for right in range(-3, 4)
                if np.array_equal(np.roll(frame, (down, right), axis=(0, 1)), moved)
            ]
            assert found  # the whole frame was shifted by at most three pixels


def test_dataset_of_movers_repeats_byte_for_byte(tmp_path: Path) -> None:
    config = movers(train=5, val=0, test=2, shake=1)
    for name in "ab":
        write_demo_data(tmp_path / name, config)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert (tmp_path / "a" / "classes.txt").read_text().split() == list(TEXTURES)
    assert [row.label for row in read_list(tmp_path / "a" / "train.csv")] == [0, 1, 2, 3, 0]
    with pytest.raises(UserError, match="made with other settings"):
        write_demo_data(tmp_path / "a", replace(config, clutter=5))


def test_stamp_of_defaults_is_that_of_before_the_later_fields() -> None:
    """Stamps leave out later fields with default values, so folders of earlier versions stay usable."""
    earlier = ["train", "val", "test", "seed", "num_frames", "size", "movers", "distractors", "radius"]
    assert list(json.loads(DemoConfig().stamp)) == earlier
    assert list(json.loads(DemoConfig(shake=2).stamp)) == [*earlier, "shake"]
    assert list(json.loads(DemoConfig(width=96, gop=250).stamp)) == [*earlier, "width", "gop"]


@pytest.mark.parametrize(
    ("config", "split", "number", "digest"),
    [
        # As rendered by commit fcf478d, before classes, clutter and shake were added.
        (DemoConfig(), "train", 3, "c3c1cc3d8d60eae84c24fe7d04319308f78d7024b83b0bd53f6412c0df6e3f89"),
        (
            DemoConfig(num_frames=5, clutter=20, shake=3, width=72),
            "val",
            6,
            "ba0787d59dc553f98c7c73e0330963dbb279f8fd64850667db7e4d129deab219",
        ),
        (
            DemoConfig(num_frames=5, classes="mover", movers=1, radius=10),
            "train",
            13,
            "9db7fab662f5705bca79dc84612210990c1a36f3dab31f2abe0ed5c59cc4082d",
        ),
        (
            DemoConfig(num_frames=5, classes="mover", clutter=20, shake=2, size=40, width=96, seed=3),
            "test",
            2,
            "6692856207b3a7fe8bcb12545c1bbf2dca1b30fd0951945f33f5174bf4a85b2b",
        ),
        # One thread: with two, torch rounds three values in a million differently on frames of this size.
        (
            DemoConfig(num_frames=2, size=224, radius=20),
            "train",
            5,
            "1a042f80173ec67f364064c9ea86a375839864c1cdb77300d8ca878400c7eaac",
        ),
    ],
)
def test_videos_are_those_of_earlier_versions(config: DemoConfig, split: str, number: int, digest: str) -> None:
    """Golden frames from commit 4e7ac09, before the code for discs and movers was merged."""
    assert hashlib.sha256(render_video(config, split, number).tobytes()).hexdigest() == digest


@pytest.mark.parametrize("classes", ["motion", "mover"])
def test_frames_need_not_be_square_and_movers_wrap_around_both_edges(classes: Any) -> None:
    config = DemoConfig(num_frames=4, size=40, width=72, radius=5, classes=classes, clutter=3, shake=1)
    frames = render_video(config, "train", 1)
    assert frames.shape == (4, 40, 72, 3)
    assert render_video(replace(config, width=40), "train", 1).shape == (4, 40, 40, 3)
    assert np.array_equal(
        render_video(replace(config, width=40), "train", 1), render_video(replace(config, width=None), "train", 1)
    )
    # Discs may be anywhere on the wide frame, so every column changes in some of the videos.
    changed = np.zeros(72, dtype=bool)
    for number in range(60):
        video = render_video(replace(config, shake=0, clutter=0), "train", number)
        changed |= (video[0] != video[3]).any(axis=(0, 2))
    assert changed.all()


@pytest.mark.parametrize("gop", [5, 12, 250])
def test_keyframes_stand_a_gop_apart(gop: int, tmp_path: Path) -> None:
    config = DemoConfig(train=1, val=0, test=0, num_frames=30, gop=gop)
    write_demo_data(tmp_path / "demo", config)
    with av.open(str(tmp_path / "demo" / "train" / "00000.mp4")) as container:
        keys = [number for number, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert keys == list(range(0, 30, gop))
