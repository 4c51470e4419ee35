"""Videos of a falling, a rolling, a swinging and a spinning body, simulated by MuJoCo; the moving one is the class.

All four bodies are simulated independently. In a video one of them moves; each other body is frozen in its state at
a random time of its own motion. A single frame therefore has the same distribution under every label and does not
show which body moves. The label is checked against the simulator's states, not against pixels.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everest_ds.data.demo import SPLITS, write_videos
from everest_ds.study.worlds.drawing import Canvas, load_mujoco
from everest_ds.study.worlds.scenes import BODIES, CELL_M, Scene, draw_scene

SIZE_PX = 64
FRAME_S = 0.05
"""Simulated seconds between two frames."""

_STEPS_A_FRAME = 20
# A video begins after this many frames, at least and at most, so that bodies are in the middle of their motion.
_LEAD = (6, 30)
# A body moves if its edge travels this many metres within every clip of `_CLIP` frames. A scene in which any body
# does not is drawn again, so that the choice of scenes does not depend on the label.
_CLIP, _LEAST_PATH_M = 8, 0.15
_MOST_TRIES = 200


@dataclass(frozen=True, kw_only=True)
class PhysicsConfig:
    """Number, seed and length of the videos."""

    train: int
    test: int
    seed: int = 0
    num_frames: int = 16
    gop: int = 12

    def count(self, split: str) -> int:
        """Return the number of videos of a split."""
        return {"train": self.train, "test": self.test}.get(split, 0)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return list(BODIES)

    @property
    def stamp(self) -> str:
        """All settings that the videos depend on, except the drawing library, as JSON."""
        settings = {name: getattr(self, name) for name in ("train", "test", "seed", "num_frames", "gop")}
        return json.dumps({"world": "physics", "mujoco": version("mujoco"), **settings}, indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class Motion:
    """A scene in which all bodies move.

    Attributes:
        model, data: MuJoCo's model and state.
        states_TS: Positions and orientations of all joints in each frame (`qpos`).
        held_at: The frame whose state each body keeps when it does not move, in the order of `BODIES`.
    """

    scene: Scene
    model: Any
    data: Any
    states_TS: NDArray[np.float64]
    held_at: tuple[int, ...]

    def states_of_video(self, label: int) -> NDArray[np.float64]:
        """Return the states_TS of the video in which only the body ``label`` moves."""
        states_TS = self.states_TS.copy()
        for body, (name, time) in enumerate(zip(BODIES, self.held_at, strict=True)):
            if body != label:
                own = _coordinates(self.model, name)
                states_TS[:, own] = self.states_TS[time, own]
        return states_TS

    def moving_bodies(self, states_TS: NDArray[np.float64]) -> list[int]:
        """Return the bodies whose state changes, and check that they move throughout.

        Raises:
            AssertionError: A body moves only in a part of the video.
        """
        paths_FB = _paths(self._edges(states_TS))
        moves_B = (paths_FB > 0).any(axis=0)
        if (paths_FB[:, moves_B] < _LEAST_PATH_M).any():
            raise AssertionError(f"a body stands still in between: {paths_FB}")
        return np.flatnonzero(moves_B).tolist()

    def is_lively(self) -> bool:
        """Return whether all bodies move throughout and none leaves its cell."""
        edges_TB3 = self._edges(self.states_TS)
        strays = np.abs(edges_TB3[:, :, :2] - np.array(self.scene.centres_m)) > 1.5 * CELL_M
        return not strays.any() and bool((_paths(edges_TB3) >= _LEAST_PATH_M).all())

    def _edges(self, states_TS: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the position of a point on each body's edge in each frame, (T, body, xyz) in metres."""
        sites = [[data.site(name).xpos.copy() for name in BODIES] for data in self._placed(states_TS)]
        return np.array(sites)

    def render(self, states_TS: NDArray[np.float64], canvas: Canvas) -> NDArray[np.uint8]:
        """Draw states; return frames_THWC, uint8."""
        mujoco = load_mujoco()
        for name, texture in self.scene.textures.items():
            begin = int(self.model.texture(name).adr[0])
            self.model.tex_data[begin : begin + texture.size] = texture.ravel()
        camera = mujoco.MjvCamera()
        camera.lookat[:] = self.scene.look_at_m
        camera.azimuth, camera.elevation = self.scene.azimuth_deg, self.scene.elevation_deg
        camera.distance = self.scene.distance_m
        return canvas.draw(self.model, self._placed(states_TS), camera)

    def _placed(self, states_TS: NDArray[np.float64]) -> Iterator[Any]:
        """Yield MuJoCo's data in each state, after forward kinematics; it is the same object every time."""
        mujoco = load_mujoco()
        for state in states_TS:
            self.data.qpos[:] = state
            mujoco.mj_forward(self.model, self.data)
            yield self.data


def try_drawing() -> None:
    """Draw one frame, to fail before anything is written if this machine cannot draw.

    Raises:
        UserError: This machine cannot draw; says why.
    """
    motion = simulate(PhysicsConfig(train=1, test=0), "train", 0)
    with Canvas(SIZE_PX) as canvas:
        motion.render(motion.states_TS[:1], canvas)


def write_physics_data(folder: Path, config: PhysicsConfig) -> None:
    """Write videos and lists with `write_videos`, which keeps videos that are already in the folder."""
    with Canvas(SIZE_PX) as canvas:
        write_videos(folder, config, lambda split, number: draw_video(config, split, number, canvas))


def draw_video(config: PhysicsConfig, split: str, number: int, canvas: Canvas) -> NDArray[np.uint8]:
    """Return the frames_THWC of a video; its class is ``number`` modulo the number of classes."""
    label = number % len(BODIES)
    motion = simulate(config, split, number)
    states_TS = motion.states_of_video(label)
    if motion.moving_bodies(states_TS) != [label]:
        raise AssertionError(f"{split} {number}: the states contradict the label {label}")
    return motion.render(states_TS, canvas)


def simulate(config: PhysicsConfig, split: str, number: int) -> Motion:
    """Simulate a video; the result depends only on seed, split and number.

    Scenes are drawn until one is lively; about two of five are.

    Raises:
        AssertionError: No scene of 200 was lively.
    """
    generator = np.random.Generator(
        np.random.Philox(
            key=np.array([config.seed, SPLITS.index(split)], dtype=np.uint64),
            counter=np.array([0, number, 0, 0], dtype=np.uint64),
        )
    )
    for _ in range(_MOST_TRIES):
        motion = _simulate(generator, config.num_frames)
        if motion.is_lively():
            return motion
    raise AssertionError(f"{split} {number}: no scene of {_MOST_TRIES} in which all bodies move")


def _simulate(generator: np.random.Generator, num_frames: int) -> Motion:
    mujoco = load_mujoco()
    scene = draw_scene(generator)
    held_at = tuple(generator.integers(num_frames, size=len(BODIES)).tolist())
    lead = int(generator.integers(*_LEAD, endpoint=True))
    model = mujoco.MjModel.from_xml_string(scene.xml)
    data = mujoco.MjData(model)
    data.joint("swings").qpos[:] = scene.angle_rad
    for name, velocity in scene.velocities.items():
        data.joint(name).qvel[:] = velocity
    states = []
    for frame in range(lead + num_frames):
        if frame >= lead:
            states.append(data.qpos.copy())
        mujoco.mj_step(model, data, nstep=_STEPS_A_FRAME)
    return Motion(scene=scene, model=model, data=data, states_TS=np.stack(states), held_at=held_at)


def _coordinates(model: Any, name: str) -> slice:
    """Return the slice of `qpos` that has the state of a body's joint."""
    begin = int(model.joint(name).qposadr[0])
    return slice(begin, begin + (1 if name in ("swings", "spins") else 7))


def _paths(edges_TB3: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how many metres each edge travels in each window of `_CLIP` frames, (window, body)."""
    steps_TB = np.linalg.norm(np.diff(edges_TB3, axis=0), axis=2)
    windows = max(len(steps_TB) - _CLIP + 2, 1)
    return np.stack([steps_TB[begin : begin + _CLIP - 1].sum(axis=0) for begin in range(windows)])
