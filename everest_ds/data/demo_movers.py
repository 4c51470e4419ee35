"""The demo's harder scenes: what moves is the class, among things of every class that stand still.

Discs of every kind of texture lie on the frame, equally many of each; those of one kind drift, each its own way,
and that kind is the class. Kinds, places, colours and which disc covers which are drawn before it is known what
moves, and places are uniform on the wrapped frame: a single frame is as likely under every class, and no count of
shapes tells one from another. Clutter and camera shake serve the other kind of classes, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KINDS = ("rows", "columns", "diagonal", "checks")

# Pixels a frame, (down, right). In the two frames of a tubelet none goes a multiple of the textures' period: a disc
# that came as far would, at stride 1, look as if it had not changed.
VELOCITIES = tuple(
    (down * speed, right * speed) for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0)) for speed in (1, 3)
)
# Least difference in brightness, of 255, between the two colours of a texture.
_CONTRAST = 150
_CLUTTER_RADII_PX = (1, 4)


@dataclass(frozen=True)
class Sprite:
    """A disc of one kind at its place in the first frame.

    Attributes:
        kind: Its texture, an index of `KINDS`.
        image_HWC: The frame's size, uint8; what is outside of the mask does not count.
        mask_HW1: Where the disc is.
    """

    kind: int
    image_HWC: NDArray[np.uint8]
    mask_HW1: NDArray[np.bool_]

    def paint(self, frame_HWC: NDArray[np.uint8], shift: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the frame with the disc on it, moved by (down, right) pixels around the frame's edges."""
        image_HWC, mask_HW1 = (np.roll(part, shift, axis=(0, 1)) for part in (self.image_HWC, self.mask_HW1))
        return np.where(mask_HW1, image_HWC, frame_HWC)


def draw_sprites(
    generator: np.random.Generator, *, frame_px: tuple[int, int], radius: int, of_each_kind: int, more: int
) -> list[Sprite]:
    """Draw discs of every kind, equally many, and some more of any kind; the last one lies on top.

    Args:
        generator: The video's draws.
        frame_px: Height and width of the frame.
        radius: Of a disc, in pixels.
        of_each_kind: Discs of every kind.
        more: Discs of any kind.
    """
    kinds = np.repeat(np.arange(len(KINDS)), of_each_kind)
    kinds = np.concatenate((kinds, generator.integers(len(KINDS), size=more)))
    return [_draw_sprite(generator, int(kind), frame_px, radius) for kind in generator.permutation(kinds)]


def render_movers(
    background_HWC: NDArray[np.uint8],
    sprites: Sequence[Sprite],
    *,
    label: int,
    velocities: Sequence[tuple[int, int]],
    num_frames: int,
) -> NDArray[np.uint8]:
    """Return the frames_THWC in which discs of the class's kind drift and all others stand still.

    Args:
        background_HWC: What lies below.
        sprites: The discs, the last one on top.
        label: The kind that moves.
        velocities: Pixels a frame, (down, right), for each disc; those of other kinds do not count.
        num_frames: Frames of the video.
    """
    frames = []
    for t in range(num_frames):
        frame_HWC = background_HWC
        for sprite, (down, right) in zip(sprites, velocities, strict=True):
            moved = t if sprite.kind == label else 0
            frame_HWC = sprite.paint(frame_HWC, (down * moved, right * moved))
        frames.append(frame_HWC)
    return np.stack(frames)


def draw_velocities(generator: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Draw a way to drift for each disc, whether it moves or not."""
    return [VELOCITIES[place] for place in generator.integers(len(VELOCITIES), size=count)]


def add_clutter(generator: np.random.Generator, background_HWC: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Return the background with small shapes of random pixels on it: detail that stands still."""
    frame_px = (background_HWC.shape[0], background_HWC.shape[1])
    for _ in range(count):
        radius = int(generator.integers(*_CLUTTER_RADII_PX, endpoint=True))
        edge = 2 * radius + 1
        image_HWC = np.zeros_like(background_HWC)
        image_HWC[:edge, :edge] = _two_colours(generator, generator.random((edge, edge)) < 0.5)
        draw_mask = _disc_mask if generator.random() < 0.5 else _square_mask
        sprite = Sprite(-1, image_HWC, draw_mask(frame_px, radius))
        background_HWC = sprite.paint(background_HWC, draw_place(generator, frame_px))
    return background_HWC


def shake_camera(generator: np.random.Generator, frames_THWC: NDArray[np.uint8], reach: int) -> NDArray[np.uint8]:
    """Return the frames, each moved as a whole by up to ``reach`` pixels each way, around its edges."""
    shifts = generator.integers(-reach, reach, size=(len(frames_THWC), 2), endpoint=True)
    moved = [
        np.roll(frame, (int(down), int(right)), axis=(0, 1))
        for frame, (down, right) in zip(frames_THWC, shifts, strict=True)
    ]
    return np.stack(moved)


def draw_place(generator: np.random.Generator, frame_px: tuple[int, int]) -> tuple[int, int]:
    """Draw a place (down, right) in pixels, uniform on a frame of this height and width."""
    down, right = generator.integers(frame_px)
    return int(down), int(right)


def _draw_sprite(generator: np.random.Generator, kind: int, frame_px: tuple[int, int], radius: int) -> Sprite:
    edge = 2 * radius + 1
    image_HWC = np.zeros((*frame_px, 3), dtype=np.uint8)
    image_HWC[:edge, :edge] = _two_colours(generator, _texture(generator, kind, edge))
    place = draw_place(generator, frame_px)
    return Sprite(
        kind, np.roll(image_HWC, place, axis=(0, 1)), np.roll(_disc_mask(frame_px, radius), place, axis=(0, 1))
    )


def _texture(generator: np.random.Generator, kind: int, edge: int) -> NDArray[np.bool_]:
    """Return where a kind's texture has its second colour; period four pixels, at a random phase."""
    phase = generator.integers(4, size=2)
    rows, cols = np.ogrid[:edge, :edge]
    down, right = rows + phase[0], cols + phase[1]
    if KINDS[kind] == "rows":
        return np.broadcast_to(down // 2 % 2 == 0, (edge, edge))
    if KINDS[kind] == "columns":
        return np.broadcast_to(right // 2 % 2 == 0, (edge, edge))
    if KINDS[kind] == "diagonal":
        return (down + right) // 2 % 2 == 0
    return (down // 2 + right // 2) % 2 == 0


def _two_colours(generator: np.random.Generator, second: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Colour a texture with two random colours that differ in brightness."""
    while True:
        colours = generator.integers(256, size=(2, 3))
        brightness = colours.mean(axis=1)
        if abs(brightness[0] - brightness[1]) >= _CONTRAST:
            return colours[second.astype(int)].astype(np.uint8)


def _disc_mask(frame_px: tuple[int, int], radius: int) -> NDArray[np.bool_]:
    rows, cols = np.ogrid[: frame_px[0], : frame_px[1]]
    return ((rows - radius) ** 2 + (cols - radius) ** 2 <= radius**2)[:, :, None]


def _square_mask(frame_px: tuple[int, int], radius: int) -> NDArray[np.bool_]:
    rows, cols = np.ogrid[: frame_px[0], : frame_px[1]]
    return ((rows <= 2 * radius) & (cols <= 2 * radius))[:, :, None]
