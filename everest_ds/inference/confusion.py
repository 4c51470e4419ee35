"""A picture of a confusion matrix: rows are true classes, columns predicted ones, dark cells have many videos."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_MAX_EDGE_PX, _MIN_CELL_PX, _MAX_CELL_PX = 1600, 3, 48
_FONT_PX = 12
# Cells of at least `_NUMBER_PX` pixels contain their count; from `_NAME_PX` on, rows and columns have names.
_NUMBER_PX, _NAME_PX = 28, 13
_LONGEST_NAME = 28
_LIGHT, _DARK = (247, 251, 255), (8, 48, 107)
_INK, _PAPER = (32, 32, 32), (255, 255, 255)


def draw_confusion(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> Image.Image:
    """Draw counts, each row shaded by its share of the true class; numbers and names where they fit."""
    font = ImageFont.load_default(_FONT_PX)
    num_classes = len(confusion)
    cell = min(_MAX_CELL_PX, max(_MIN_CELL_PX, _MAX_EDGE_PX // num_classes))
    shown = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in names]
    named = cell >= _NAME_PX
    margin = _FONT_PX * 2 + (max((int(font.getlength(name)) for name in shown), default=0) + 8 if named else 8)
    edge = margin + cell * num_classes
    image = Image.new("RGB", (edge + 8, edge + 8), _PAPER)
    draw = ImageDraw.Draw(image)
    for true, counts in enumerate(confusion):
        for predicted, count in enumerate(counts):
            left, top = margin + predicted * cell, margin + true * cell
            share = count / (sum(counts) or 1)
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=_shade(share))
            if cell >= _NUMBER_PX and count:
                ink = _PAPER if share > 0.5 else _INK
                draw.text((left + cell / 2, top + cell / 2), str(count), fill=ink, font=font, anchor="mm")
        if named:
            middle = margin + true * cell + cell / 2
            draw.text((margin - 4, middle), shown[true], fill=_INK, font=font, anchor="rm")
            _draw_upright(image, shown[true], (round(middle), margin - 4), font)
    draw.rectangle((margin - 1, margin - 1, edge, edge), outline=_INK)
    draw.text((margin + cell * num_classes / 2, 4), "predicted", fill=_INK, font=font, anchor="mt")
    _draw_upright(image, "true", (_FONT_PX, margin + cell * num_classes // 2), font)
    return image


def save_confusion(confusion: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """Write the picture as a PNG."""
    draw_confusion(confusion, names).save(path, format="PNG")


def _shade(share: float) -> tuple[int, int, int]:
    red, green, blue = (round(light + (dark - light) * share) for light, dark in zip(_LIGHT, _DARK, strict=True))
    return red, green, blue


def _draw_upright(
    image: Image.Image, text: str, foot: tuple[int, int], font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> None:
    """Write a text from bottom to top; ``foot`` is the middle of its lower end."""
    length = max(1, round(font.getlength(text)))
    strip = Image.new("RGB", (length, _FONT_PX + 4), _PAPER)
    ImageDraw.Draw(strip).text((0, (_FONT_PX + 4) / 2), text, fill=_INK, font=font, anchor="lm")
    upright = strip.rotate(90, expand=True)
    image.paste(upright, (foot[0] - upright.width // 2, max(0, foot[1] - upright.height)))
