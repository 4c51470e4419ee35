"""A clip's picture as GIF or MP4: one image a frame, with all panels side by side."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from everest_ds.pictures.clip import PicturedClip
from everest_ds.pictures.clip_sheet import cell_of
from everest_ds.pictures.paint import Pixels, fit_frames, paint_heat, paint_kept
from everest_ds.pictures.sheet import Band, draw_sheet

_PANEL_PX = 280
_MIN_FRAME_S, _MAX_FRAME_S, _UNKNOWN_S = 0.04, 0.5, 0.125


def moving_pictures(picture: PicturedClip, *, title: str) -> list[Image.Image]:
    """Draw an image for each frame: the frame, importance, kept tokens of each choice, reconstruction."""
    grid, cell, per_step = picture.grid, cell_of(picture, _PANEL_PX), picture.tubelet_size
    frames = fit_frames(picture.frames_THWC, grid, cell)
    panels: list[tuple[str, Pixels]] = [("frames", frames)]
    if picture.importance_N is not None:
        heat = paint_heat(picture.importance_N, grid, cell, picture.heat_limits)
        panels.append(("importance", heat.repeat(per_step, axis=0)))
    for choice in picture.choices:
        roles = choice.roles(grid).repeat(per_step, axis=0)
        panels.append((choice.label, paint_kept(frames, roles, cell)))
        if choice.reconstruction_THWC is not None:
            panels.append(("reconstruction", fit_frames(choice.reconstruction_THWC, grid, cell)))
    columns = 2 if len(panels) == 4 else min(len(panels), 4)
    captions = tuple(name for name, _ in panels)
    return [
        draw_sheet(
            title,
            [picture.label_of_frame(frame)],
            [Band(title="", tiles_THWC=np.stack([pixels[frame] for _, pixels in panels]), captions=captions)],
            columns=columns,
        )
        for frame in range(len(frames))
    ]


def frame_seconds(picture: PicturedClip) -> float:
    """Return the seconds between frames of the clip, at least 0.04 and at most 0.5; 0.125 if times are unknown."""
    times = picture.times_s
    if times is None or len(times) < 2 or times[-1] <= times[0]:
        return _UNKNOWN_S
    return float(np.clip((times[-1] - times[0]) / (len(times) - 1), _MIN_FRAME_S, _MAX_FRAME_S))


def save_gif(images: Sequence[Image.Image], seconds: float, path: Path) -> None:
    """Write a GIF that loops forever."""
    # All images share one palette, so that colours do not flicker.
    palette = images[len(images) // 2].quantize(256, method=Image.Quantize.MEDIANCUT)
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=round(seconds * 1000), loop=0)


def save_mp4(images: Sequence[Image.Image], seconds: float, path: Path) -> None:
    """Write an H.264 MP4."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(1 / seconds).limit_denominator(1000))
        stream.width, stream.height = (edge + edge % 2 for edge in images[0].size)  # H.264 needs even edges
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"}
        for image in images:
            padded = np.full((stream.height, stream.width, 3), 255, np.uint8)
            padded[: image.height, : image.width] = np.asarray(image)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(padded, format="rgb24")))
        container.mux(stream.encode())
