"""Draw the frame selection: all candidate frames with their probabilities, the drawn ones sharp."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from everest_ds.pictures.colours import PAPER, VISIBLE
from everest_ds.pictures.paint import DIM, Pixels
from everest_ds.pictures.sheet import Band, draw_sheet

_TILE_PX, _BAR_PX, _EDGE_PX = 170, 40, 3


def draw_frame_choice(
    frames_THWC: Pixels,
    counts_C: NDArray[np.int64],
    steps: Sequence[int],
    labels: Sequence[str],
    *,
    title: str,
    lines: Sequence[str] = (),
) -> Image.Image:
    """Draw the candidate frames of a clip and which of them were drawn.

    A candidate step that was not drawn is blurred and dim. The bar below a step shows its probability of being
    drawn first, relative to the largest.

    Args:
        frames_THWC: The candidate frames, uint8; equally many for each candidate step.
        counts_C: Chosen tokens of each candidate step.
        steps: The steps that were drawn.
        labels: Time of each candidate frame, as text.
        title: First line.
        lines: More lines above the picture.
    """
    per_step = len(frames_THWC) // len(counts_C)
    total, drawn = int(counts_C.sum()), set(steps)
    edge = _TILE_PX * np.array(frames_THWC.shape[2:0:-1]) // max(frames_THWC.shape[1:3])
    tiles, captions = [], []
    for step, count in enumerate(counts_C):
        frame = Image.fromarray(frames_THWC[step * per_step]).resize((int(edge[0]), int(edge[1])))
        tiles.append(
            np.vstack([paint_candidate(frame, is_drawn=step in drawn), paint_bar(count, counts_C, edge[0])])
        )
        share = f"{count / total:.1%}" if total else "uniform"
        captions.append(f"{labels[step * per_step]}  p {share}  c {count}")
    band = Band(
        title=f"candidate time steps (first of {per_step} frames each); drawn ones are sharp and framed; bars: p",
        tiles_THWC=np.stack(tiles),
        captions=tuple(captions),
    )
    return draw_sheet(title, lines, [band])


def paint_candidate(frame: Image.Image, *, is_drawn: bool) -> Pixels:
    """Return a candidate frame's pixels: framed if it was drawn, else blurred and dim."""
    if not is_drawn:
        blurred = np.asarray(frame.filter(ImageFilter.GaussianBlur(3)), np.float32)
        return (blurred * (0.35 + DIM)).round().astype(np.uint8)
    pixels = np.array(frame)
    pixels[:_EDGE_PX] = pixels[-_EDGE_PX:] = VISIBLE
    pixels[:, :_EDGE_PX] = pixels[:, -_EDGE_PX:] = VISIBLE
    return pixels


def paint_bar(count: int, counts_C: NDArray[np.int64], width: int) -> Pixels:
    """Return a bar whose height is a step's count relative to the largest."""
    pixels = np.full((_BAR_PX, width, 3), PAPER, np.uint8)
    height = round(int(count) * (_BAR_PX - 4) / max(1, int(counts_C.max())))
    pixels[_BAR_PX - height :, width // 4 : width - width // 4] = VISIBLE
    return pixels
