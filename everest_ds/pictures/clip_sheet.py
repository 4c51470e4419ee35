"""Draw a clip: frames, importance, kept tokens over dimmed frames and reconstruction, one column a time step."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from everest_ds.pictures.clip import DROPPED, HIDDEN, SEEN, PicturedClip, TokenChoice
from everest_ds.pictures.colours import INK, PAPER, font, heat_colours
from everest_ds.pictures.paint import Pixels, fit_frames, paint_heat, paint_kept
from everest_ds.pictures.sheet import TEXT_PX, Band, draw_sheet

TILE_PX = 168
"""Approximate width of a tile."""
_RAMP_PX = 140


def cell_of(picture: PicturedClip, tile_px: int = TILE_PX) -> int:
    """Return the edge of a token in pixels that makes a tile about ``tile_px`` wide."""
    return max(4, tile_px // max(picture.grid.rows, picture.grid.cols))


def draw_clip(
    picture: PicturedClip, *, title: str, lines: Sequence[str] = (), tile_px: int = TILE_PX, columns: int = 8
) -> Image.Image:
    """Draw a clip, its importance, and the tokens that each choice keeps.

    Args:
        picture: The clip and its kept tokens.
        title: First line, for example the video's name.
        lines: More lines above the picture.
        tile_px: Approximate width of a time step.
        columns: At most this many time steps in a row.
    """
    bands = clip_bands(picture, cell_of(picture, tile_px))
    return draw_sheet(title, lines, bands, legend=draw_legend(picture), columns=columns)


def clip_bands(picture: PicturedClip, cell: int) -> list[Band]:
    """Return the rows of a clip's picture; a tile shows the first frame of a time step."""
    grid, first = picture.grid, slice(None, None, picture.tubelet_size)
    frames = fit_frames(picture.frames_THWC[first], grid, cell)
    times = tuple(picture.label_of_frame(step * picture.tubelet_size) for step in range(grid.time))
    bands = [Band(title=f"frames: the first of each time step's {picture.tubelet_size}", tiles_THWC=frames,
                  captions=times)]  # fmt: skip
    if picture.importance_N is not None:
        bands.append(
            Band(
                title="importance: change since the previous time step; the first step uses that of the second",
                tiles_THWC=paint_heat(picture.importance_N, grid, cell, picture.heat_limits),
            )
        )
    for choice in picture.choices:
        bands += _bands_of(choice, picture, frames, cell)
    return bands


def _bands_of(choice: TokenChoice, picture: PicturedClip, frames: Pixels, cell: int) -> list[Band]:
    """Return the rows of one choice: its kept tokens, and the reconstruction if it has one."""
    grid, roles = picture.grid, choice.roles(picture.grid)
    still = picture.count_still(choice)
    note = f"; {still} of them do not change (a tie)" if still else ""
    bands = [
        Band(
            title=f"{choice.label}: {choice.describe(grid)}{note}",
            tiles_THWC=paint_kept(frames, roles, cell),
            captions=tuple(_count(step) for step in roles),
        )
    ]
    if choice.reconstruction_THWC is not None:
        loss = "" if choice.loss is None else f"; loss {choice.loss:.3f}"
        rebuilt = fit_frames(choice.reconstruction_THWC[:: picture.tubelet_size], grid, cell)
        bands.append(
            Band(
                title="reconstruction: predicted tokens have their true mean and contrast, all others are the "
                f"original{loss}",
                tiles_THWC=rebuilt,
            )
        )
    return bands


def _count(roles_hw: Pixels) -> str:
    seen, hidden = int(((roles_hw & SEEN) > 0).sum()), int(((roles_hw & HIDDEN) > 0).sum())
    return f"{seen} + {hidden}" if hidden else f"{seen}"


def draw_legend(picture: PicturedClip) -> Image.Image:
    """Draw the meaning of colours and patterns in one line."""
    has_targets = any(len(choice.predicted_R) for choice in picture.choices)
    cell, height = 20, 26
    entries = [(SEEN, "visible to the encoder"), *([(HIDDEN, "predicted by the decoder")] if has_targets else [])]
    legend = Image.new("RGB", (1100 if picture.importance_N is not None else 620, height), PAPER)
    draw, x = ImageDraw.Draw(legend), 0
    grey = np.full((1, cell, cell, 3), 170, np.uint8)
    for role, text in [*entries, (DROPPED, "not kept")]:
        swatch = paint_kept(grey, np.full((1, 1, 1), role, np.uint8), cell)[0]
        legend.paste(Image.fromarray(swatch), (x, 2))
        draw.text((x + cell + 6, height / 2), text, fill=INK, font=font(TEXT_PX), anchor="lm")
        x += cell + 6 + round(font(TEXT_PX).getlength(text)) + 22
    if picture.importance_N is not None:
        low, high = (f"{limit:.3g}" for limit in picture.heat_limits)
        draw.text((x, height / 2), f"importance {low}", fill=INK, font=font(TEXT_PX), anchor="lm")
        x += round(font(TEXT_PX).getlength(f"importance {low}")) + 6
        ramp = heat_colours(np.linspace(0, 1, _RAMP_PX))[None].repeat(16, axis=0)
        legend.paste(Image.fromarray(ramp), (x, 5))
        draw.text((x + _RAMP_PX + 6, height / 2), f"{high} or more", fill=INK, font=font(TEXT_PX), anchor="lm")
        x += _RAMP_PX + 12 + round(font(TEXT_PX).getlength(f"{high} or more"))
    return legend.crop((0, 0, x, height))
