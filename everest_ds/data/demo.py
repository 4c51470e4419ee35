"""A small labelled video dataset whose classes differ only in motion: `everest demo-data`.

Each video shows discs on a smooth background. Some drift and wrap around the frame's edges, the others stand still.
The class is either how they drift (four directions, two speeds; all discs have smooth textures) or which of four
textures drifts (`classes="mover"`). In every frame the positions of the discs are uniform and independent of the
class, so a single frame does not reveal it. Clutter on the background and a shaking camera make the task harder.

Every video is drawn from (seed, split, number) by a counter-based generator, and x264 is set so that files are
identical byte by byte. The order of the draws is part of the format.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Literal, Protocol

import av
import numpy as np
from numpy.typing import NDArray

from everest_ds.errors import UserError
from everest_ds.files import atomic_path, write_atomically
from everest_ds.progress import with_progress

DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
MOTIONS = {
    f"{name}-{speed}px": (down * speed, right * speed)
    for name, (down, right) in DIRECTIONS.items()
    for speed in (1, 2)
}
"""Class names of `classes="motion"` and their drift in pixels a frame, (down, right)."""

TEXTURES = ("rows", "columns", "diagonal", "checks")
"""Class names of `classes="mover"`: two-coloured textures with a period of four pixels."""

# Drifts of `classes="mover"`. Over the two frames of a tubelet no drift is a multiple of the textures' period;
# otherwise the disc would look unchanged at stride 1.
VELOCITIES = tuple((down * speed, right * speed) for down, right in DIRECTIONS.values() for speed in (1, 3))

SPLITS = ("train", "val", "test")
STAMP = "demo.json"
_SMOOTH_CELLS = 4
# Least difference in mean brightness, of 255, between the two colours of a texture.
_CONTRAST = 150
_CLUTTER_RADII_PX = (1, 4)
# Fields added after the stamp: it contains them only where they differ from their default.
_LATER_FIELDS = ("classes", "clutter", "shake", "width", "gop")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of `everest demo-data`."""

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
    """Height in pixels; also the width unless width is set."""
    movers: int = 2
    """Discs that drift, all of them alike with classes=motion."""
    distractors: int = 2
    """Discs that stand still."""
    radius: int = 7
    """Radius of a disc in pixels."""
    classes: Literal["motion", "mover"] = "motion"
    """motion: eight classes, the direction and speed of the drift; mover: four classes, the texture that drifts.
    With mover, a frame shows `movers` discs of every texture and `distractors` more that stand still."""
    clutter: int = 0
    """Small shapes of random pixels on the background."""
    shake: int = 0
    """Largest shift of the camera in pixels; every frame draws a vertical and a horizontal one."""
    width: int | None = None
    """Width in pixels; None for the height."""
    gop: int = 12
    """Largest number of frames between keyframes; more makes files smaller and seeking slower."""

    def __post_init__(self) -> None:
        """Check each field, and the disc against the frame."""
        for least, names in (
            (1, ("train", "num_frames", "movers", "radius", "gop")),
            (0, ("val", "test", "seed", "distractors", "clutter", "shake")),
        ):
            for name in names:
                if getattr(self, name) < least:
                    raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        for name, edge in zip(("size", "width"), self.frame_px, strict=True):
            if edge % 2 or edge < 4 * self.radius:
                raise UserError(f"{name}={edge} must be even and at least four radii ({4 * self.radius})")

    def count(self, split: str) -> int:
        """Return the number of videos of a split."""
        return int(getattr(self, split))

    @property
    def frame_px(self) -> tuple[int, int]:
        """(height, width) of a frame in pixels."""
        return self.size, self.size if self.width is None else self.width

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return list(MOTIONS if self.classes == "motion" else TEXTURES)

    @property
    def stamp(self) -> str:
        """Content of `demo.json`: all settings; fields added later only where they differ from their default."""
        defaults = {field.name: field.default for field in fields(self)}
        kept = {
            name: value
            for name, value in asdict(self).items()
            if name not in _LATER_FIELDS or value != defaults[name]
        }
        return json.dumps(kept, indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A disc, or a piece of clutter.

    Attributes:
        image_EEC: Pixels of a square with E pixels a side, uint8.
        mask_EE1: True where a pixel is drawn.
        corner: Top left pixel (down, right) of the square in the first frame.
        velocity: Pixels a frame, (down, right).
        texture: Index into `TEXTURES`; None for other textures.
    """

    image_EEC: NDArray[np.uint8]
    mask_EE1: NDArray[np.bool_]
    corner: tuple[int, int]
    velocity: tuple[int, int] = (0, 0)
    texture: int | None = None

    def paint(self, frame_HWC: NDArray[np.uint8], time: int = 0) -> None:
        """Paint the shape onto a frame in place, at its position in frame ``time``; it wraps around the edges."""
        steps = np.arange(len(self.image_EEC))
        rows, cols = (
            (start + speed * time + steps) % length
            for start, speed, length in zip(self.corner, self.velocity, frame_HWC.shape[:2], strict=True)
        )
        square = np.ix_(rows, cols)
        frame_HWC[square] = np.where(self.mask_EE1, self.image_EEC, frame_HWC[square])


def render_video(config: DemoConfig, split: str, number: int) -> NDArray[np.uint8]:
    """Return the frames_THWC of a video; its class is ``number`` modulo the number of classes."""
    generator = make_generator(config, split, number)
    background_HWC = draw_background(generator, config)
    shapes = draw_discs(generator, config, number % len(config.class_names))
    frames_THWC = render(background_HWC, shapes, config.num_frames)
    return _shake(generator, frames_THWC, config.shake) if config.shake else frames_THWC


def make_generator(config: DemoConfig, split: str, number: int) -> np.random.Generator:
    """Return the generator of a video's draws."""
    key = np.array([config.seed, SPLITS.index(split)], dtype=np.uint64)
    counter = np.array([0, number, 0, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def draw_background(generator: np.random.Generator, config: DemoConfig) -> NDArray[np.uint8]:
    """Return the background (H, W, C), with its clutter."""
    background_HWC = _smooth_texture(generator, config.frame_px)
    for _ in range(config.clutter):
        radius = int(generator.integers(*_CLUTTER_RADII_PX, endpoint=True))
        edge = 2 * radius + 1
        image_EEC = _two_colours(generator, generator.random((edge, edge)) < 0.5)
        mask_EE1 = _disc_mask(radius) if generator.random() < 0.5 else np.ones((edge, edge, 1), dtype=bool)
        corner = _draw_corner(generator, config.frame_px)
        Shape(image_EEC=image_EEC, mask_EE1=mask_EE1, corner=corner).paint(background_HWC)
    return background_HWC


def draw_discs(generator: np.random.Generator, config: DemoConfig, label: int) -> list[Shape]:
    """Return the discs of a video in the order of painting. Only their velocities depend on the label."""
    mask_EE1 = _disc_mask(config.radius)
    if config.classes == "motion":
        kinds: list[int | None] = [None] * (config.distractors + config.movers)
    else:
        textures = np.repeat(np.arange(len(TEXTURES)), config.movers)
        textures = np.concatenate((textures, generator.integers(len(TEXTURES), size=config.distractors)))
        kinds = generator.permutation(textures).tolist()
    drawn = []
    for kind in kinds:
        image_EEC = _disc_image(generator, kind, 2 * config.radius + 1)
        drawn.append((image_EEC, _draw_corner(generator, config.frame_px)))
    if config.classes == "motion":
        velocities = [(0, 0)] * config.distractors + [list(MOTIONS.values())[label]] * config.movers
    else:
        chosen = [VELOCITIES[i] for i in generator.integers(len(VELOCITIES), size=len(kinds))]
        velocities = [way if kind == label else (0, 0) for way, kind in zip(chosen, kinds, strict=True)]
    return [
        Shape(image_EEC=image_EEC, mask_EE1=mask_EE1, corner=corner, velocity=velocity, texture=kind)
        for (image_EEC, corner), velocity, kind in zip(drawn, velocities, kinds, strict=True)
    ]


def render(background_HWC: NDArray[np.uint8], shapes: list[Shape], num_frames: int) -> NDArray[np.uint8]:
    """Return the frames_THWC of shapes that drift over a background; the last shape is on top."""
    frames_THWC = np.repeat(background_HWC[None], num_frames, axis=0)
    for time, frame_HWC in enumerate(frames_THWC):
        for shape in shapes:
            shape.paint(frame_HWC, time)
    return frames_THWC


def _shake(generator: np.random.Generator, frames_THWC: NDArray[np.uint8], reach: int) -> NDArray[np.uint8]:
    """Return the frames, each rolled by up to ``reach`` pixels along both axes."""
    shifts = generator.integers(-reach, reach, size=(len(frames_THWC), 2), endpoint=True)
    return np.stack(
        [np.roll(frame, shift, axis=(0, 1)) for frame, shift in zip(frames_THWC, shifts.tolist(), strict=True)]
    )


def _draw_corner(generator: np.random.Generator, frame_px: tuple[int, int]) -> tuple[int, int]:
    down, right = generator.integers(frame_px)
    return int(down), int(right)


def _smooth_texture(generator: np.random.Generator, size_px: tuple[int, int]) -> NDArray[np.uint8]:
    """Return random cells (H, W, C), enlarged bilinearly.

    Computed in float32, each product added with one rounding and in this order: bitwise identical to
    torch.nn.functional.interpolate, which earlier versions used.
    """
    cells_HWC = generator.random((3, _SMOOTH_CELLS, _SMOOTH_CELLS), dtype=np.float32).transpose(1, 2, 0)
    (top, down), (left, right) = (_between_cells(length) for length in size_px)
    up, down, left_share, right_share = 1 - down, down, 1 - right, right
    smooth_HWC = np.zeros((*size_px, 3), dtype=np.float32)
    for rows, cols, row_shares, col_shares in (
        (top, left + 1, up, right_share),
        (top, left, up, left_share),
        (top + 1, left, down, left_share),
        (top + 1, left + 1, down, right_share),
    ):
        corner_HWC = cells_HWC[np.ix_(rows % _SMOOTH_CELLS, cols % _SMOOTH_CELLS)].astype(np.float64)
        shares_HW1 = np.outer(row_shares, col_shares)[:, :, None]
        smooth_HWC = (corner_HWC * shares_HW1 + smooth_HWC).astype(np.float32)
    return (smooth_HWC * 255).round().astype(np.uint8)


def _between_cells(length: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return, for each pixel of an edge, the cell before it and the share of the cell after it."""
    places = np.arange(length, dtype=np.float32) * np.float32((_SMOOTH_CELLS - 1) / (length - 1))
    cells = places.astype(np.int64)
    return cells, (places - cells).astype(np.float32)


def _disc_image(generator: np.random.Generator, texture: int | None, edge: int) -> NDArray[np.uint8]:
    """Return a square of one of `TEXTURES` at a random phase and in random colours, or a smooth one."""
    if texture is None:
        return _smooth_texture(generator, (edge, edge))
    phase = generator.integers(4, size=2)
    rows, cols = np.ogrid[:edge, :edge]
    down, right = rows + phase[0], cols + phase[1]
    bands = {"rows": down // 2, "columns": right // 2, "diagonal": (down + right) // 2}
    band = bands.get(TEXTURES[texture], down // 2 + right // 2)
    return _two_colours(generator, np.broadcast_to(band % 2 == 0, (edge, edge)))


def _two_colours(generator: np.random.Generator, is_second_EE: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Colour a texture with two random colours that differ in brightness."""
    while True:
        colours = generator.integers(256, size=(2, 3))
        first, second = (sum(colour) / 3 for colour in colours.tolist())  # faster than numpy on six numbers
        if abs(first - second) >= _CONTRAST:
            return colours[is_second_EE.astype(int)].astype(np.uint8)


def _disc_mask(radius: int) -> NDArray[np.bool_]:
    rows, cols = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return (rows**2 + cols**2 <= radius**2)[:, :, None]


class VideoSet(Protocol):
    """Labelled videos that can be drawn: what `DemoConfig` says of its own."""

    @property
    def gop(self) -> int: ...

    @property
    def class_names(self) -> list[str]: ...

    @property
    def stamp(self) -> str: ...

    def count(self, split: str) -> int: ...


def write_demo_data(folder: Path, config: DemoConfig) -> list[Path]:
    """Write a demo dataset as `write_videos` does; return its lists."""
    return write_videos(folder, config, lambda split, number: render_video(config, split, number))


def write_videos(folder: Path, config: VideoSet, render_one: Callable[[str, int], NDArray[np.uint8]]) -> list[Path]:
    """Write videos, classes.txt, one list for each split and a stamp with the settings; return the lists.

    ``render_one`` returns the frames_THWC of a video by split and number; its class is the number modulo the number
    of classes. A folder with the complete dataset is left as it is; an incomplete one is completed. Lists are
    written after all videos.

    Raises:
        UserError: The folder contains something else, or a dataset with other settings.
    """
    lists = [folder / f"{split}.csv" for split in SPLITS if config.count(split)]
    names = config.class_names
    stamp, begun = folder / STAMP, folder / f"{STAMP}.begun"
    for path in (stamp, begun):
        if path.is_file() and path.read_text() != config.stamp:
            raise UserError(
                f"{folder} contains a demo dataset made with other settings; remove it or name another folder"
            )
    if stamp.is_file():
        return lists
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "classes.txt").is_file():
        raise UserError(f"{folder} is not empty and contains no demo dataset; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "classes.txt", "\n".join(names) + "\n")
    videos = [(split, number) for split in SPLITS for number in range(config.count(split))]
    if not begun.is_file():
        for split, number in videos:  # without the stamp they are not ours
            (folder / _video_name(split, number)).unlink(missing_ok=True)
        write_atomically(begun, config.stamp)
    for split, number in with_progress(videos, len(videos)):
        path = folder / _video_name(split, number)
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            with atomic_path(path) as partial:
                encode_h264(partial, render_one(split, number), gop=config.gop)
    for path in lists:
        rows = (f"{_video_name(path.stem, i)} {i % len(names)}\n" for i in range(config.count(path.stem)))
        write_atomically(path, "".join(rows))
    begun.replace(stamp)
    return lists


def _video_name(split: str, number: int) -> str:
    return f"{split}/{number:05d}.mp4"


def encode_h264(path: Path, frames_THWC: NDArray[np.uint8], *, frames_per_s: int = 30, gop: int = 12) -> None:
    """Encode frames as H.264 in MP4, a keyframe at least every ``gop`` frames; equal frames give equal bytes."""
    height, width = frames_THWC.shape[1:3]
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(frames_per_s))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        # Macroblock-tree rate control reads uninitialised memory: the same frames gave six different files.
        stream.options = {"crf": "16", "preset": "veryfast", "g": str(gop), "x264-params": "mbtree=0"}
        for image in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
