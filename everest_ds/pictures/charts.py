"""Charts: kept tokens by time step, and curves of a run. Axes: T time steps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from everest_ds.pictures.colours import INK, PAPER, PREDICTED, VISIBLE, Colour, font
from everest_ds.pictures.sheet import MARGIN, TEXT_PX

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

_BAR_PX, _GAP_PX, _HEIGHT_PX = 48, 14, 160


def draw_kept_by_step(
    visible_T: NDArray[np.floating], predicted_T: NDArray[np.floating], *, title: str
) -> Image.Image:
    """Draw a stacked bar a time step: visible tokens below predicted ones, with their sum above.

    Drawn without matplotlib, because its import takes longer than many such charts.
    """
    total_T = visible_T + predicted_T
    width = max(len(total_T) * (_BAR_PX + _GAP_PX), round(font(TEXT_PX).getlength(title))) + 2 * MARGIN
    line = TEXT_PX + 5
    chart = Image.new("RGB", (width, _HEIGHT_PX + 3 * line + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(chart)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=font(TEXT_PX))
    floor = MARGIN + 2 * line + _HEIGHT_PX
    scale = _HEIGHT_PX / max(1.0, float(total_T.max()))
    for step, (visible, predicted) in enumerate(zip(visible_T, predicted_T, strict=True)):
        left, low = MARGIN + step * (_BAR_PX + _GAP_PX), floor
        parts: tuple[tuple[float, Colour], ...] = ((visible, VISIBLE), (predicted, PREDICTED))
        for count, colour in parts:
            high = low - round(float(count) * scale)
            if high < low:
                draw.rectangle((left, high, left + _BAR_PX - 1, low - 1), fill=colour)
            low = high
        middle = left + _BAR_PX / 2
        draw.text((middle, low - 3), f"{visible + predicted:.0f}", fill=INK, font=font(TEXT_PX), anchor="mb")
        draw.text((middle, floor + 4), f"step {step + 1}", fill=INK, font=font(TEXT_PX - 2), anchor="mt")
    return chart


def draw_curves(curves: Mapping[str, Points], *, title: str) -> "Figure":
    """Draw curves over steps, one chart below another; curves without finite points are left out.

    Args:
        curves: Step and value of each point, by name.
        title: Title of the figure.
    """
    from matplotlib.figure import Figure

    finite = {name: [(x, y) for x, y in points if np.isfinite(y)] for name, points in curves.items()}
    shown = {name: points for name, points in finite.items() if points}
    figure = Figure(figsize=(9, 1 + 3 * max(1, len(shown))), dpi=110, layout="constrained")
    figure.suptitle(title)
    for place, (name, points) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(len(shown), 1, place)
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=[c / 255 for c in (0, 90, 160)], marker="." if len(points) < 60 else None)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.set_xlabel("optimiser step" if place == len(shown) else "")
    return figure
