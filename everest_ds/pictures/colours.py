"""Colours of the pictures, safe for colour-blind readers, and the font.

Visible and predicted tokens differ in colour (blue, orange), in lightness and in pattern (solid edge, hatching).
The heat ramp rises in lightness from dark blue through grey to yellow, as matplotlib's cividis does.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK: Colour = (30, 30, 30)
FAINT: Colour = (110, 110, 110)
PAPER: Colour = (255, 255, 255)
VISIBLE: Colour = (86, 180, 233)
PREDICTED: Colour = (230, 159, 0)
HEAT: tuple[Colour, ...] = ((0, 30, 78), (66, 78, 108), (124, 123, 120), (188, 174, 108), (254, 232, 69))
"""Evenly spaced points of the heat ramp, from no change to most change."""


def heat_colours(share: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Map shares in [0, 1] to colours of the heat ramp, of shape (..., 3); other values are clipped."""
    places = np.clip(share, 0, 1) * (len(HEAT) - 1)
    channels = [np.interp(places, range(len(HEAT)), [colour[i] for colour in HEAT]) for i in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


@functools.cache
def font(size: int, *, bold: bool = False) -> Font:
    """Return matplotlib's sans-serif font (Latin, Greek, Cyrillic), or Pillow's if matplotlib is not installed."""
    spec = importlib.util.find_spec("matplotlib")  # an import would take most of a second
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / name
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)
