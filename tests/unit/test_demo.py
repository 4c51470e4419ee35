from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from everest_ds.data import demo
from everest_ds.data.demo import CLASS_NAMES, DemoConfig, render_video, velocity_of, write_demo_data
from everest_ds.data.index import read_list
from everest_ds.data.video import Video
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
    """With x264's macroblock tree, this video came out in six variants in 60 tries."""
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
    assert (tmp_path / "demo" / "classes.txt").read_text().split() == CLASS_NAMES


def test_movers_drift_by_the_velocity_of_the_class_and_nothing_else_moves() -> None:
    """Oracle: where two frames differ, shifting by the velocity explains every mover pixel."""
    config = DemoConfig(train=8, num_frames=5, movers=1, distractors=1)
    for label in range(len(CLASS_NAMES)):
        frames = render_video(config, "train", label).astype(int)
        down, right = velocity_of(label)
        assert abs(down) + abs(right) in (1, 2)
        background = np.median(render_video(config, "train", label), axis=0)
        for t in range(1, 5):
            changed = np.abs(frames[t] - frames[0]).max(axis=2) > 0
            assert 0 < changed.sum() < 0.35 * changed.size
        # A pixel deep inside the mover is found again, shifted.
        moving = np.abs(frames[0] - background).max(axis=2) > 0
        rows, cols = np.nonzero(moving)
        shifted = frames[1][(rows + down) % config.size, (cols + right) % config.size]
        agree = (np.abs(shifted - frames[0][rows, cols]).max(axis=1) == 0).mean()
        assert agree > 0.5


def test_no_single_frame_gives_the_class_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every frame of one class is, pixel for pixel, a first frame that any other class can start from.

    The movers' start is uniform on the wrapped frame. Starting a video of another class where this one has come to
    gives the same frame, so given a frame all classes are equally likely.
    """
    config = DemoConfig(train=8, num_frames=7, movers=2)
    reached = render_video(config, "train", 0)[6]
    down, right = velocity_of(0)
    original = demo._disc
    calls = 0

    def started_elsewhere(generator: np.random.Generator, given: DemoConfig) -> tuple[np.ndarray, np.ndarray]:
        nonlocal calls
        calls += 1
        image, mask = original(generator, given)
        if calls <= config.distractors:
            return image, mask
        return tuple(np.roll(part, (6 * down, 6 * right), axis=(0, 1)) for part in (image, mask))

    monkeypatch.setattr(demo, "_disc", started_elsewhere)
    monkeypatch.setattr(demo, "velocity_of", lambda label: (-2, 0))  # the draws of video 0, another class
    assert np.array_equal(render_video(config, "train", 0)[0], reached)


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
    "change", [{"train": 0}, {"val": -1}, {"size": 63}, {"size": 20}, {"radius": 0}, {"num_frames": 0}]
)
def test_impossible_settings_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(UserError):
        DemoConfig(**change)
