"""Draw a random scene of the physics world, as XML in MuJoCo's format.

Four cells between low walls contain one body each, in random order: a pendulum, a rotor, a ball and a block. Each
body has its own hue and pattern, which tell nothing about the label because all four are in every video. Sizes,
shapes, shades, places, camera, light and motionless clutter are random in each video. Nothing depends on the label.
"""

import math
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BODIES = ("falls", "rolls", "swings", "spins")
"""Names of the classes and of their bodies: block, ball, pendulum, rotor."""

CELL_M = 0.5
"""Half the edge of a cell in metres."""

_STILL_TEXTURES = ("ground", "stone")
_FACE = 32  # edge of a body's texture in texels; it has six faces
_HUES = {"falls": 0.0, "rolls": 0.33, "swings": 0.62, "spins": 0.15}  # in [0, 1]: red, green, blue, yellow
_BRIGHT, _DARK = (0.85, 1.0), (0.15, 0.35)
_CENTRES_M = tuple((x * CELL_M, y * CELL_M) for x in (-1, 1) for y in (-1, 1))
_CLUTTER = 8
# Bodies collide with still things but not with each other, so that each moves as if it were alone.
_STILL, _MOBILE, _GHOST = (
    'contype="1" conaffinity="0"',
    'contype="0" conaffinity="1"',
    'contype="0" conaffinity="0"',
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A scene in its initial state.

    Attributes:
        xml: The scene in MuJoCo's format. Body, joint and site (a point on its edge) are named as in `BODIES`.
        centres_m: Centre of each body's cell, (x, y) in metres, in the order of `BODIES`.
        angle_rad: Initial angle of the pendulum.
        velocities: Initial velocities of each body's joint, in metres and radians per second.
        textures: RGB texels, uint8, by the name of a texture in ``xml``, where they are white.
        azimuth_deg, elevation_deg, distance_m, look_at_m: The camera.
    """

    xml: str
    centres_m: tuple[tuple[float, float], ...]
    angle_rad: float
    velocities: dict[str, tuple[float, ...]]
    textures: dict[str, NDArray[np.uint8]]
    azimuth_deg: float
    elevation_deg: float
    distance_m: float
    look_at_m: tuple[float, float, float]


def draw_scene(generator: np.random.Generator) -> Scene:
    """Draw a scene."""
    centres_m = tuple(_CENTRES_M[i] for i in generator.permutation(len(_CENTRES_M)).tolist())
    spin = generator.choice((-1, 1)) * generator.uniform(4, 8)
    way, speed = generator.uniform(0, math.tau), generator.uniform(2, 3)
    parts = [
        _block(generator, centres_m[0]),
        _ball(generator, centres_m[1]),
        _pendulum(generator, centres_m[2]),
        _rotor(generator, centres_m[3]),
        _still_things(generator),
    ]
    return Scene(
        xml=_document(generator, "\n".join(parts)),
        centres_m=centres_m,
        angle_rad=float(generator.choice((-1, 1)) * generator.uniform(0.7, 1.2)),
        velocities={
            "falls": (*generator.uniform(-0.1, 0.1, size=2), 0.0, *generator.uniform(-3, 3, size=3)),
            "rolls": (speed * math.cos(way), speed * math.sin(way), 0.0, 0.0, 0.0, 0.0),
            "swings": (0.0,),
            "spins": (spin,),
        },
        textures={name: _noise(generator) for name in _STILL_TEXTURES}
        | {name: _pattern(generator, name) for name in BODIES},
        azimuth_deg=generator.uniform(0, 360),
        elevation_deg=generator.uniform(-45, -35),
        distance_m=generator.uniform(2.4, 2.6),
        look_at_m=(*generator.uniform(-0.1, 0.1, size=2), generator.uniform(0.2, 0.35)),
    )


def _document(generator: np.random.Generator, things: str) -> str:
    x, y = generator.uniform(-1.2, 1.2, size=2)
    bright, ambient = generator.uniform(0.4, 0.8), generator.uniform(0.15, 0.35)
    textures = [
        f'<texture name="{name}" type="2d" builtin="flat" width="64" height="64"/>'
        f'<material name="{name}" texture="{name}" texrepeat="2 2" specular="0.1"/>'
        for name in _STILL_TEXTURES
    ]
    textures += [
        f'<texture name="{name}" type="cube" builtin="flat" width="{_FACE}" height="{_FACE}"/>'
        f'<material name="{name}" texture="{name}"/>'
        for name in BODIES
    ]
    # Contacts return most of the energy, so that bodies keep moving.
    return f"""<mujoco>
<compiler angle="radian"/>
<option timestep="0.0025"/>
<default><geom solref="-10000 -5" friction="0.6"/></default>
<visual>
  <global offwidth="64" offheight="64"/>
  <quality shadowsize="128" offsamples="4" numslices="12" numstacks="8" numquads="1"/>
  <headlight ambient="{ambient} {ambient} {ambient}" diffuse="0.2 0.2 0.2" specular="0 0 0"/>
</visual>
<asset>
  <texture type="skybox" builtin="gradient" width="16" height="16" rgb1="{_colour(generator)}"
    rgb2="{_colour(generator)}"/>
  {"".join(textures)}
</asset>
<worldbody>
  <light pos="{x} {y} 3" dir="{-x} {-y} -3" diffuse="{bright} {bright} {bright}" castshadow="true"/>
  <geom type="plane" size="8 8 0.1" material="ground" {_STILL}/>
{things}
</worldbody>
</mujoco>"""


def _block(generator: np.random.Generator, centre_m: tuple[float, float]) -> str:
    """Return a block of random shape and orientation above the floor."""
    shape = generator.choice(("box", "cylinder", "capsule", "ellipsoid"))
    size_m = generator.uniform(0.16, 0.22, size=3)
    turn = _numbers(generator.normal(size=4))
    return f"""<body name="falls" pos="{_numbers(centre_m)} {generator.uniform(0.6, 1.0)}" quat="{turn}">
  <freejoint name="falls"/><geom type="{shape}" size="{_numbers(size_m)}" material="falls" {_MOBILE}/>
  <site name="falls" pos="{size_m[0]} 0 0" rgba="0 0 0 0"/></body>"""


def _ball(generator: np.random.Generator, centre_m: tuple[float, float]) -> str:
    """Return a ball on the floor."""
    radius_m = generator.uniform(0.2, 0.26)
    return f"""<body name="rolls" pos="{_numbers(centre_m)} {radius_m}">
  <freejoint name="rolls"/><geom type="sphere" size="{radius_m}" material="rolls" {_MOBILE}/>
  <site name="rolls" pos="0 0 {radius_m}" rgba="0 0 0 0"/></body>"""


def _pendulum(generator: np.random.Generator, centre_m: tuple[float, float]) -> str:
    """Return a rod with a weight that hangs from a gallows and swings in a random direction."""
    way = generator.uniform(0, math.tau)
    east, north = math.cos(way), math.sin(way)
    x, y = centre_m
    height_m, rod_m, weight_m = generator.uniform((0.75, 0.4, 0.16), (0.9, 0.5, 0.2))
    shape = generator.choice(("sphere", "box", "cylinder"))
    foot, top = f"{x + 0.35 * east} {y + 0.35 * north}", f"{x} {y} {height_m}"
    return f"""<geom type="capsule" fromto="{foot} 0 {foot} {height_m}" size="0.03" material="stone" {_GHOST}/>
<geom type="capsule" fromto="{foot} {height_m} {top}" size="0.03" material="stone" {_GHOST}/>
<body name="swings" pos="{top}"><joint name="swings" type="hinge" axis="{east} {north} 0"/>
  <geom type="capsule" fromto="0 0 0 0 0 {-rod_m}" size="0.025" material="swings" {_GHOST}/>
  <geom type="{shape}" pos="0 0 {-rod_m}" size="{_numbers([weight_m] * 3)}" material="swings" {_GHOST}/>
  <site name="swings" pos="0 0 {-rod_m}" rgba="0 0 0 0"/></body>"""


def _rotor(generator: np.random.Generator, centre_m: tuple[float, float]) -> str:
    """Return two to four blades on a post that turn about a tilted axis."""
    height_m, length_m, width_m = generator.uniform((0.45, 0.36, 0.08), (0.7, 0.46, 0.12))
    tilt, way = generator.uniform(0, 1.0), generator.uniform(0, math.tau)
    axis = (math.sin(tilt) * math.cos(way), math.sin(tilt) * math.sin(way), math.cos(tilt))
    count = int(generator.integers(2, 4, endpoint=True))
    blades = [
        f'<geom type="box" pos="{_numbers((math.cos(a) * length_m / 2, math.sin(a) * length_m / 2, 0))}" '
        f'euler="0 0 {a}" size="{length_m / 2} {width_m} 0.03" material="spins" {_GHOST}/>'
        for a in (math.tau * i / count for i in range(count))
    ]
    x, y = centre_m
    return f"""<geom type="capsule" fromto="{x} {y} 0 {x} {y} {height_m}" size="0.03" material="stone" {_GHOST}/>
<body name="spins" pos="{x} {y} {height_m}" zaxis="{_numbers(axis)}"><joint name="spins" type="hinge" axis="0 0 1"/>
  {"".join(blades)}<site name="spins" pos="{length_m} 0 0" rgba="0 0 0 0"/></body>"""


def _still_things(generator: np.random.Generator) -> str:
    """Return the walls between the cells, a stone in a corner of each, and clutter around them."""
    high_m = generator.uniform(0.09, 0.12)
    walls = [
        f'<geom type="box" pos="{_numbers(pos)} {high_m}" size="{_numbers(size)} {high_m}" material="stone" '
        f'rgba="{_colour(generator)} 1" {_STILL}/>'
        for line in (-2 * CELL_M, 0.0, 2 * CELL_M)
        for pos, size in (((line, 0), (0.03, 2 * CELL_M)), ((0, line), (2 * CELL_M, 0.03)))
    ]
    corners = [(x + generator.choice((-0.4, 0.4)), y + generator.choice((-0.4, 0.4))) for x, y in _CENTRES_M]
    ways, far_m = generator.uniform(0, math.tau, size=_CLUTTER), generator.uniform(1.5, 2.2, size=_CLUTTER)
    around = list(zip(far_m * np.cos(ways), far_m * np.sin(ways), strict=True))
    return "\n".join(
        [*walls, *(_stone(generator, at) for at in corners), *(_stone(generator, at) for at in around)]
    )


def _stone(generator: np.random.Generator, at_m: tuple[float, float]) -> str:
    shape = generator.choice(("box", "cylinder", "sphere", "ellipsoid"))
    reach = 0.08 if max(map(abs, at_m)) < 2 * CELL_M else 0.25
    size = generator.uniform(0.06, reach, size=3)
    return (
        f'<geom type="{shape}" pos="{_numbers(at_m)} {size[2]}" size="{_numbers(size)}" material="stone" '
        f'rgba="{_colour(generator)} 1" euler="0 0 {generator.uniform(0, 3)}" {_STILL}/>'
    )


def _pattern(generator: np.random.Generator, body: str) -> NDArray[np.uint8]:
    """Return a body's pattern in a bright and a dark shade of its hue, six faces stacked vertically."""
    rows, cols = np.ogrid[:_FACE, :_FACE]
    is_dark = {
        "falls": np.broadcast_to(rows // 5 % 2 == 1, (_FACE, _FACE)),  # stripes
        "rolls": (rows // 6 + cols // 6) % 2 == 1,  # checks
        "swings": (rows % 12 - 6) ** 2 + (cols % 12 - 6) ** 2 < 16,  # dots
        "spins": np.zeros((_FACE, _FACE), dtype=bool),  # plain
    }
    hue = (_HUES[body] + generator.uniform(-0.05, 0.05)) % 1
    shades = [hsv_to_rgb(hue, generator.uniform(0.6, 1), generator.uniform(*value)) for value in (_BRIGHT, _DARK)]
    texels = 255 * np.array(shades)[is_dark[body].astype(int)]
    return np.tile(texels.astype(np.uint8), (6, 1, 1))


def _noise(generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return 64 x 64 texels in random shades of one colour, as a sum of coarse and fine cells."""
    colour, shades = generator.uniform(60, 200, size=3), np.zeros((64, 64))
    for cells in (2, 8):
        shades += np.kron(generator.uniform(-1, 1, size=(cells, cells)), np.ones((64 // cells, 64 // cells)))
    return np.clip(colour + 30 * shades[:, :, None], 0, 255).astype(np.uint8)


def _colour(generator: np.random.Generator) -> str:
    return _numbers(generator.uniform(0.05, 1, size=3))


def _numbers(values: Sequence[float] | np.ndarray) -> str:
    return " ".join(str(float(value)) for value in values)
