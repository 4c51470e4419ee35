"""Paint importance and kept tokens as pixels. Axes: T time steps, H W pixels, C colour, N tokens.

Every token is a square cell of ``cell`` pixels, so tiles have ``rows * cell`` x ``cols * cell`` pixels.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from everest_ds.pictures.clip import HIDDEN, SEEN
from everest_ds.pictures.colours import INK, PREDICTED, VISIBLE, heat_colours
from everest_ds.tokens import TokenGrid

Pixels = NDArray[np.uint8]

DIM = 0.4
"""Brightness of tokens that are not kept."""
TINT, HATCH_PX = 0.35, 6
"""Share of orange in predicted tokens, and the distance between their lines."""


def fit_frames(frames_THWC: Pixels, grid: TokenGrid, cell: int) -> Pixels:
    """Resize frames so that every token covers one cell."""
    size = (grid.cols * cell, grid.rows * cell)
    if frames_THWC.shape[2:0:-1] == size:
        return frames_THWC
    images = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames_THWC]
    return np.stack([np.asarray(image) for image in images])


def paint_heat(
    importance_N: NDArray[np.float32], grid: TokenGrid, cell: int, limits: tuple[float, float]
) -> Pixels:
    """Return importance as heat maps, one tile a time step; ``limits`` are drawn darkest and brightest."""
    low, high = limits
    share = (importance_N.reshape(grid.time, grid.rows, grid.cols).astype(np.float64) - low) / (high - low)
    return heat_colours(share).repeat(cell, axis=1).repeat(cell, axis=2)


def paint_kept(frames_THWC: Pixels, roles_Thw: NDArray[np.uint8], cell: int) -> Pixels:
    """Return frames with the kept tokens marked.

    Dropped tokens are grey and dim. Visible ones keep their pixels; a solid blue line surrounds each group of them.
    Predicted ones are tinted and hatched in orange. A token that is both has the line and the hatching.

    Args:
        frames_THWC: One frame a time step, resized by `fit_frames`.
        roles_Thw: Roles of the tokens (`TokenChoice.roles`).
        cell: Pixels of a token's edge.
    """
    roles = roles_Thw.repeat(cell, axis=1).repeat(cell, axis=2)
    seen, hidden = (roles & SEEN) > 0, (roles & HIDDEN) > 0
    pixels = frames_THWC.astype(np.float32)
    grey = (pixels @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    tinted = (1 - TINT) * pixels + TINT * np.array(PREDICTED, np.float32)
    out = np.where(seen[..., None], pixels, np.where(hidden[..., None], tinted, DIM * grey))
    y, x = np.indices(roles.shape[1:])
    # A dark line next to a bright one is visible on every background.
    out[hidden & ((x + y) % HATCH_PX == 0)] = PREDICTED
    out[hidden & ((x + y) % HATCH_PX == 1)] = INK
    out[seen & _outlines(roles_Thw & SEEN > 0, cell)] = VISIBLE
    return out.round().astype(np.uint8)


def _outlines(marked_Thw: NDArray[np.bool_], cell: int) -> NDArray[np.bool_]:
    """Return the edges of marked tokens, (T, H, W), without those between two marked tokens."""
    width = 1 if cell < 10 else 2
    around = np.pad(marked_Thw, ((0, 0), (1, 1), (1, 1)))
    y, x = np.indices((marked_Thw.shape[1] * cell, marked_Thw.shape[2] * cell)) % cell
    sides = (
        (around[:, :-2, 1:-1], y < width),
        (around[:, 2:, 1:-1], y >= cell - width),
        (around[:, 1:-1, :-2], x < width),
        (around[:, 1:-1, 2:], x >= cell - width),
    )
    lines = [~neighbour.repeat(cell, axis=1).repeat(cell, axis=2) & strip for neighbour, strip in sides]
    return np.logical_or.reduce(lines)
