"""The physics world: labels against simulated states, held bodies, repeatable videos, refusals."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from everest_ds import cli
from everest_ds.data.lists.video_list import read_list
from everest_ds.errors import UserError
from everest_ds.study.worlds import drawing
from everest_ds.study.worlds.drawing import REQUIREMENT, Canvas, load_mujoco, require_drawing
from everest_ds.study.worlds.physics import PhysicsConfig, draw_video, simulate, write_physics_data
from everest_ds.study.worlds.scenes import BODIES
from tests.conftest import REPOSITORY

CONFIG = PhysicsConfig(train=8, test=4)


@pytest.fixture
def world() -> None:
    """Require MuJoCo and a rendering library."""
    try:
        load_mujoco()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def canvas(world: None) -> Iterator[Canvas]:
    with Canvas(64) as opened:
        yield opened


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("number", range(4))
def test_label_is_the_only_body_whose_coordinates_change(number: int) -> None:
    """Coordinates are found by MuJoCo's table of joints: seven of a free body, one of a hinge."""
    motion = simulate(CONFIG, "train", number)
    states_TS = motion.states_of_video(number)
    begins = {name: int(motion.model.joint(name).qposadr[0]) for name in BODIES}
    ends = [*sorted(begins.values())[1:], motion.model.nq]
    for body, name in enumerate(BODIES):
        own_TS = states_TS[:, begins[name] : ends[sorted(begins.values()).index(begins[name])]]
        assert own_TS.shape[1] == (1 if name in ("swings", "spins") else 7)
        free_TS = motion.states_TS[:, begins[name] : begins[name] + own_TS.shape[1]]
        if body == number:
            assert np.array_equal(own_TS, free_TS)
            assert (np.abs(np.diff(own_TS, axis=0)).max(axis=1) > 0).all()
        else:  # held in one of its states in free motion
            assert (own_TS == free_TS[motion.held_at[body]]).all()
    assert motion.moving_bodies(states_TS) == [number]


@pytest.mark.usefixtures("world")
def test_states_that_contradict_a_label_are_found() -> None:
    motion = simulate(CONFIG, "train", 0)
    assert motion.moving_bodies(motion.states_TS) == [0, 1, 2, 3]
    held_TS = np.repeat(motion.states_TS[:1], CONFIG.num_frames, axis=0)
    assert motion.moving_bodies(held_TS) == []
    stops_TS = motion.states_of_video(3)
    stops_TS[6:] = stops_TS[6]
    with pytest.raises(AssertionError, match="stands still in between"):
        motion.moving_bodies(stops_TS)


@pytest.mark.usefixtures("world")
def test_bodies_move_by_physics() -> None:
    """Between bounces a block accelerates by gravity; a rotor keeps its speed, a pendulum does not gain height."""
    motion = simulate(PhysicsConfig(train=8, test=4, num_frames=32), "train", 5)
    height_T = motion.states_TS[:, int(motion.model.joint("falls").qposadr[0]) + 2]
    acceleration_T = np.diff(height_T, n=2) / 0.05**2
    assert np.isclose(acceleration_T, -9.81, atol=0.02).sum() >= 3  # in flight
    angle_T = motion.states_TS[:, int(motion.model.joint("spins").qposadr[0])]
    assert np.allclose(np.diff(angle_T), np.diff(angle_T)[0])
    swing_T = motion.states_TS[:, int(motion.model.joint("swings").qposadr[0])]
    assert np.abs(swing_T).max() <= abs(motion.scene.angle_rad) + 0.01


@pytest.mark.usefixtures("world")
def test_a_frame_does_not_depend_on_the_label_where_the_bodies_stand_alike(canvas: Canvas) -> None:
    """If all bodies have the same states at one time, every label gives the same frame."""
    motion = simulate(CONFIG, "train", 1)
    time = 7
    frames = []
    for label in range(4):
        states_TS = motion.states_of_video(label)
        states_TS[time] = motion.states_TS[time]
        frames.append(motion.render(states_TS[time : time + 1], canvas)[0])
    assert all(np.array_equal(frame, frames[0]) for frame in frames)
    assert frames[0].std() > 10  # something is drawn


@pytest.mark.usefixtures("world")
def test_videos_repeat_and_show_motion_where_the_body_is(canvas: Canvas, tmp_path: Path) -> None:
    frames_THWC = draw_video(CONFIG, "train", 2, canvas)
    assert frames_THWC.shape == (16, 64, 64, 3)
    other_THWC = draw_video(CONFIG, "test", 2, canvas)
    with Canvas(64) as second:
        assert np.array_equal(draw_video(CONFIG, "test", 2, second), other_THWC)
        assert np.array_equal(draw_video(CONFIG, "train", 2, second), frames_THWC)
    changes_HW = (frames_THWC != frames_THWC[:1]).any(axis=(0, 3))
    assert 0.005 < changes_HW.mean() < 0.5
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_physics_data(folder, PhysicsConfig(train=4, test=4))
    videos = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.mp4"))
    assert len(videos) == 8
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in videos)
    assert [row.label for row in read_list(tmp_path / "a" / "test.csv")] == [0, 1, 2, 3]
    assert (tmp_path / "a" / "classes.txt").read_text().split() == list(BODIES)
    with pytest.raises(UserError, match="other settings"):
        write_physics_data(tmp_path / "a", PhysicsConfig(train=4, test=4, seed=1))


@pytest.mark.usefixtures("world")
def test_single_bodies_are_spread_over_their_cells_alike() -> None:
    """Over many videos, each body appears in each of the four cells."""
    places = {name: set() for name in BODIES}
    for number in range(24):
        for name, centre in zip(BODIES, simulate(CONFIG, "train", number).scene.centres_m, strict=True):
            places[name].add(centre)
    assert all(len(found) == 4 for found in places.values())


def test_missing_package_is_refused_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    hidden = SimpleNamespace(find_spec=lambda name: None if name == "mujoco" else real(name))
    monkeypatch.setattr(drawing.importlib, "util", hidden)
    assert cli.main(["study", str(tmp_path / "s"), "--world", "physics"]) == 2
    assert f"pip install '{REQUIREMENT}'" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    assert f'physics = ["{REQUIREMENT}"]' in (REPOSITORY / "pyproject.toml").read_text()


@pytest.mark.usefixtures("world")
def test_missing_libraries_are_refused_and_the_first_that_is_there_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(drawing.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(UserError, match=r"libEGL or libOSMesa.*apt install libegl1"):
        require_drawing()
    monkeypatch.setattr(drawing.ctypes.util, "find_library", lambda name: name == "OSMesa" and "libOSMesa.so")
    monkeypatch.setenv("MUJOCO_GL", "")  # so that monkeypatch restores it
    require_drawing()
    assert drawing.os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    require_drawing()
    assert drawing.os.environ["MUJOCO_GL"] == "glfw"


@pytest.mark.usefixtures("world")
def test_library_that_gives_nothing_to_draw_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    motion = simulate(CONFIG, "train", 0)

    def fail(width: int, height: int) -> None:
        raise RuntimeError("no EGL device")

    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(load_mujoco(), "GLContext", fail)
    with Canvas(64) as canvas, pytest.raises(UserError, match=r"MUJOCO_GL='egl' \(no EGL device\); on Debian"):
        motion.render(motion.states_TS[:1], canvas)
