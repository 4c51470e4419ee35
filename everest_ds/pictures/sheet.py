"""Draw rows of tiles with captions on one image. Axes: T tiles, H W pixels, C colour."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from everest_ds.errors import escaped
from everest_ds.pictures.colours import FAINT, INK, PAPER, font

MARGIN, GAP = 12, 4
TITLE_PX, TEXT_PX = 17, 13
_LINE = 5
"""Pixels between lines of text."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Band:
    """A row of tiles.

    Attributes:
        title: Text above the row.
        tiles_THWC: Pixels, uint8.
        captions: Text below each tile; empty for no captions.
    """

    title: str
    tiles_THWC: NDArray[np.uint8]
    captions: tuple[str, ...] = ()


def draw_sheet(
    title: str, lines: Sequence[str], bands: Sequence[Band], *, legend: Image.Image | None = None, columns: int = 8
) -> Image.Image:
    """Draw bands below each other under a title; bands that are too wide are broken into blocks.

    Args:
        title: First line, large; shortened to fit.
        lines: More lines, wrapped to fit.
        bands: Rows with equal numbers and sizes of tiles.
        legend: Drawn below the lines.
        columns: At most this many tiles in a row; blocks have about equally many.
    """
    num, height, width = bands[0].tiles_THWC.shape[:3]
    columns = math.ceil(num / math.ceil(num / columns))
    inner = max(min(num, columns) * (width + GAP) - GAP, 560 if legend is None else legend.width)
    wrapped = [part for line in lines for part in wrap(line, inner)]
    heights = [TITLE_PX + 2 * _LINE, *[TEXT_PX + _LINE] * len(wrapped), legend.height if legend else 0, GAP]
    tops = [height + GAP + TEXT_PX + _LINE + (TEXT_PX + _LINE if band.captions else 0) for band in bands]
    blocks = math.ceil(num / columns)
    total = 2 * MARGIN + sum(heights) + blocks * sum(tops) + (blocks - 1) * MARGIN
    sheet = Image.new("RGB", (inner + 2 * MARGIN, total), PAPER)
    draw, y = ImageDraw.Draw(sheet), MARGIN
    draw.text(
        (MARGIN, y), shorten(title, inner, size=TITLE_PX, bold=True), fill=INK, font=font(TITLE_PX, bold=True)
    )
    y += TITLE_PX + 2 * _LINE
    for line in wrapped:
        draw.text((MARGIN, y), line, fill=INK, font=font(TEXT_PX))
        y += TEXT_PX + _LINE
    if legend:
        sheet.paste(legend, (MARGIN, y))
        y += legend.height
    y += GAP
    for start in range(0, num, columns):
        for band, size in zip(bands, tops, strict=True):
            _draw_band(sheet, band, range(start, min(start + columns, num)), y)
            y += size
        y += MARGIN
    return sheet


def _draw_band(sheet: Image.Image, band: Band, shown: range, y: int) -> None:
    draw = ImageDraw.Draw(sheet)
    height, width = band.tiles_THWC.shape[1:3]
    heading = shorten(band.title, sheet.width - 2 * MARGIN, bold=True)
    draw.text((MARGIN, y), heading, fill=INK, font=font(TEXT_PX, bold=True))
    y += TEXT_PX + _LINE
    for column, tile in enumerate(shown):
        x = MARGIN + column * (width + GAP)
        sheet.paste(Image.fromarray(band.tiles_THWC[tile]), (x, y))
        if band.captions:
            caption = shorten(band.captions[tile], width)
            draw.text((x + width / 2, y + height + 2), caption, fill=FAINT, font=font(TEXT_PX), anchor="mt")


def shorten(text: str, width: int, *, size: int = TEXT_PX, bold: bool = False) -> str:
    """Return a text that fits into ``width`` pixels; an ellipsis replaces the middle of a longer one."""
    text = escaped(text)
    keep, shown, letters = len(text), text, font(size, bold=bold)
    while keep > 1 and letters.getlength(shown) > width:
        keep -= 1
        shown = f"{text[: keep // 2]}…{text[len(text) - (keep - keep // 2) :]}"
    return shown


def wrap(text: str, width: int) -> list[str]:
    """Break a text at spaces into lines of at most ``width`` pixels."""
    lines: list[str] = []
    for word in escaped(text).split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(TEXT_PX).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(shorten(word, width))
    return lines
