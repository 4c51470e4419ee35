"""A small labelled video dataset that needs motion to be told apart: `everest demo-data`.

Smooth textured discs drift over a smooth textured background; other discs stand still. The class is the direction
(four) and the speed (two) of the drift. The movers wrap around the frame, so at every moment their positions
are uniform whatever the class: no single frame gives the class away. With `classes="mover"` the class is what
moves instead of how (`demo_movers`), and with clutter and shake it is harder to find. Every video derives from
(seed, split, number), and x264 is set so that the files repeat byte for byte.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from everest_ds.errors import UserError
from everest_ds.files import atomic_path, write_atomically

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
    image_HWC[:edge, :edge] = _two_colours(generator, _two_tone_texture(generator, kind, edge))
    place = draw_place(generator, frame_px)
    return Sprite(
        kind, np.roll(image_HWC, place, axis=(0, 1)), np.roll(_disc_mask(frame_px, radius), place, axis=(0, 1))
    )


def _two_tone_texture(generator: np.random.Generator, kind: int, edge: int) -> NDArray[np.bool_]:
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


DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
SPEEDS_PX = (1, 2)
CLASS_NAMES = [f"{direction}-{speed}px" for direction in DIRECTIONS for speed in SPEEDS_PX]
SPLITS = ("train", "val", "test")
STAMP = "demo.json"

_TEXTURE_CELLS = 4
# Fields that came later: a stamp has them only where they are not at their default, as if they were not there.
_LATER_FIELDS = ("classes", "clutter", "shake", "width", "gop")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What `everest demo-data` makes."""

    train: int = 640
    """Training videos."""
    val: int = 160
    """Validation videos."""
    test: int = 160
    """Test videos."""
    seed: int = 0
    """Seed of every video."""
    num_frames: int = 32
    """Frames of a video."""
    size: int = 64
    """Height in pixels, and width where that is not given."""
    movers: int = 2
    """Discs that drift, all alike."""
    distractors: int = 2
    """Discs that stand still."""
    radius: int = 7
    """Radius of a disc in pixels."""
    classes: Literal["motion", "mover"] = "motion"
    """motion: direction and speed of the drift, eight classes; mover: which of four textures drifts, with `movers`
    discs of every texture in the frame and `distractors` more of any that stand still."""
    clutter: int = 0
    """Small shapes of random pixels on the background."""
    shake: int = 0
    """Pixels by which the camera shakes from frame to frame, at most, down and right or back."""
    width: int | None = None
    """Width in pixels; the height without this."""
    gop: int = 12
    """Frames from one keyframe to the next at most; longer ones make smaller files and slower seeking."""

    def __post_init__(self) -> None:
        """Check each field, and the disc against the frame."""
        for name in ("train", "num_frames", "movers", "radius", "gop"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("val", "test", "seed", "distractors", "clutter", "shake"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        for name, edge in zip(("size", "width"), self.frame_px, strict=True):
            if edge % 2 or edge < 4 * self.radius:
                raise UserError(f"{name}={edge} must be even and at least four radii ({4 * self.radius})")

    def count(self, split: str) -> int:
        """Return the number of videos of a split."""
        return int(getattr(self, split))

    @property
    def frame_px(self) -> tuple[int, int]:
        """Height and width of the frames in pixels."""
        return self.size, self.size if self.width is None else self.width

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return CLASS_NAMES if self.classes == "motion" else list(KINDS)

    @property
    def stamp(self) -> str:
        """What `demo.json` holds: all settings, later ones where they are not at their default."""
        defaults = {field.name: field.default for field in fields(self)}
        kept = {
            name: value
            for name, value in asdict(self).items()
            if name not in _LATER_FIELDS or value != defaults[name]
        }
        return json.dumps(kept, indent=2) + "\n"


def velocity_of(label: int) -> tuple[int, int]:
    """Return a class's drift in pixels a frame, (down, right)."""
    direction, speed = CLASS_NAMES[label].removesuffix("px").split("-")
    down, right = DIRECTIONS[direction]
    return down * int(speed), right * int(speed)


def render_video(config: DemoConfig, split: str, number: int) -> NDArray[np.uint8]:
    """Return the frames_THWC of a video; its class is ``number`` modulo the number of classes."""
    key = np.array([config.seed, SPLITS.index(split)], dtype=np.uint64)
    counter = np.array([0, number, 0, 0], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    background = _texture(generator, config.frame_px)
    if config.clutter:
        background = add_clutter(generator, background, config.clutter)
    label = number % len(config.class_names)
    draw = _drift if config.classes == "motion" else _move
    frames = draw(generator, config, background, label)
    return shake_camera(generator, frames, config.shake) if config.shake else frames


def _drift(
    generator: np.random.Generator, config: DemoConfig, still: NDArray[np.uint8], label: int
) -> NDArray[np.uint8]:
    for _ in range(config.distractors):
        disc, mask = _disc(generator, config)
        still = np.where(mask, disc, still)
    movers = [_disc(generator, config) for _ in range(config.movers)]
    down, right = velocity_of(label)
    return np.stack([_draw(still, movers, (down * t, right * t)) for t in range(config.num_frames)])


def _move(
    generator: np.random.Generator, config: DemoConfig, background: NDArray[np.uint8], label: int
) -> NDArray[np.uint8]:
    sprites = draw_sprites(
        generator,
        frame_px=config.frame_px,
        radius=config.radius,
        of_each_kind=config.movers,
        more=config.distractors,
    )
    velocities = draw_velocities(generator, len(sprites))
    return render_movers(background, sprites, label=label, velocities=velocities, num_frames=config.num_frames)


def write_demo_data(
    folder: Path, config: DemoConfig, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Path]:
    """Write videos, classes.txt, one list a split, and a stamp of what was made; return the lists.

    A folder that already holds this very dataset is left as it is, and one that holds a part of it is completed.
    Lists are written when all videos are there.

    Raises:
        UserError: The folder holds something else.
    """
    lists = [folder / f"{split}.csv" for split in SPLITS if config.count(split)]
    names = config.class_names
    stamp, begun = folder / STAMP, folder / f"{STAMP}.begun"
    for path in (stamp, begun):
        if path.is_file() and path.read_text() != config.stamp:
            raise UserError(
                f"{folder} holds a demo dataset made with other settings; remove it or name another folder"
            )
    if stamp.is_file():
        return lists
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "classes.txt").is_file():
        raise UserError(f"{folder} is not empty and holds no demo dataset; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "classes.txt", "\n".join(names) + "\n")
    videos = [(split, number) for split in SPLITS for number in range(config.count(split))]
    if not begun.is_file():
        for split, number in videos:  # made by something else
            (folder / _video_name(split, number)).unlink(missing_ok=True)
        write_atomically(begun, config.stamp)
    for done, (split, number) in enumerate(videos, start=1):
        path = folder / _video_name(split, number)
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            with atomic_path(path) as partial:
                encode_h264(partial, render_video(config, split, number), gop=config.gop)
        on_progress(done, len(videos))
    for path in lists:
        rows = (f"{_video_name(path.stem, i)} {i % len(names)}\n" for i in range(config.count(path.stem)))
        write_atomically(path, "".join(rows))
    begun.replace(stamp)
    return lists


def _video_name(split: str, number: int) -> str:
    return f"{split}/{number:05d}.mp4"


def encode_h264(path: Path, frames_THWC: NDArray[np.uint8], *, frames_per_s: int = 30, gop: int = 12) -> None:
    """Encode frames as H.264 in MP4, with one thread and no macroblock tree: equal frames give equal bytes.

    From one keyframe to the next it is at most ``gop`` frames.
    """
    import av

    height, width = frames_THWC.shape[1:3]
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(frames_per_s))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        # Macroblock-tree rate control reads memory that nobody wrote: the same frames gave six different files.
        stream.options = {"crf": "16", "preset": "veryfast", "g": str(gop), "x264-params": "mbtree=0"}
        for image in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _texture(generator: np.random.Generator, frame_px: tuple[int, int]) -> NDArray[np.uint8]:
    cells = torch.from_numpy(generator.random((1, 3, _TEXTURE_CELLS, _TEXTURE_CELLS), dtype=np.float32))
    smooth = F.interpolate(cells, size=frame_px, mode="bilinear", align_corners=True)
    return (smooth[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def _disc(generator: np.random.Generator, config: DemoConfig) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return a disc of its own texture at a uniform place of the wrapped frame, and its mask (H, W, 1)."""
    (height, width), radius = config.frame_px, config.radius
    image = np.zeros((height, width, 3), dtype=np.uint8)
    edge = 2 * radius + 1
    image[:edge, :edge] = _texture(generator, (edge, edge))
    rows, cols = np.ogrid[:height, :width]
    mask = ((rows - radius) ** 2 + (cols - radius) ** 2 <= radius**2)[:, :, None]
    place = draw_place(generator, (height, width))
    return np.roll(image, place, axis=(0, 1)), np.roll(mask, place, axis=(0, 1))


def _draw(
    still: NDArray[np.uint8],
    movers: list[tuple[NDArray[np.uint8], NDArray[np.bool_]]],
    shift: tuple[int, int],
) -> NDArray[np.uint8]:
    frame = still
    for image, mask in movers:
        frame = np.where(np.roll(mask, shift, axis=(0, 1)), np.roll(image, shift, axis=(0, 1)), frame)
    return frame
