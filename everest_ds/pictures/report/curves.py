"""Draw curves of several runs in one SVG; the page's style sheet colours them. Axes: P points.

A curve of many points is cut into stretches. The line shows the mean of each stretch, the band around it the
minimum and maximum, so no peak is lost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from everest_ds.pictures.report.markup import Markup, element

NUM_COLOURS, NUM_DASHES = 8, 4
_WIDTH, _HEIGHT = 520, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 16, 14, 44
_MARKED = 40
"""A curve of at most this many points also shows them as dots."""
_LOG_SPAN = math.log(30)
_CUT, _CALM, _CALM_FROM_ZERO = 4, 0.98, 0.9
"""The axis is cut a little above this quantile of the values if their range is over `_CUT` times as wide. Waits and
speeds, whose axes begin at 0, have outliers after each start: they use the lower quantile."""

Array = NDArray[np.float64]
_Scale = Callable[[float], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """A curve of a chart: its run's label, its place among the page's colours and dashes, and its points."""

    label: str
    place: int
    x_P: Array
    y_P: Array


def line_class(place: int) -> str:
    """Return the CSS classes of a run's lines: eight colours with four dashes, distinct for 32 runs."""
    return f"c{place % NUM_COLOURS} d{(place + place // NUM_COLOURS) % NUM_DASHES}"


def thin(x_P: Array, y_P: Array, most: int) -> tuple[Array, Array, Array, Array]:
    """Cut a curve into at most ``most`` equal stretches; return mean x and minimum, mean and maximum y of each.

    A curve of at most ``most`` points keeps all of them.
    """
    edges = np.linspace(0, len(x_P), min(most, len(x_P)) + 1).astype(int)
    starts, lengths = edges[:-1], np.diff(edges)
    low_P, high_P = np.minimum.reduceat(y_P, starts), np.maximum.reduceat(y_P, starts)
    x_P, mean_P = (np.add.reduceat(values_P, starts) / lengths for values_P in (x_P, y_P))
    return x_P, low_P, mean_P, high_P


def draw_chart(
    title: str, lines: Sequence[Line], *, x_high: float, x_label: str, from_zero: bool = False, most: int = 600
) -> Markup:
    """Draw curves on common axes; the y scale is logarithmic if all values are positive and span a factor above 30.

    A linear y axis may cut off the few highest values; the chart then says how many.

    Args:
        title: Title of the chart.
        lines: Curves with at least one point in all; values are finite.
        x_high: End of the x axis, which begins at 0.
        x_label: Label of the x axis.
        from_zero: Whether the y scale is linear and begins at 0.
        most: At most this many points a curve.
    """
    y_P = np.concatenate([line.y_P for line in lines])
    x_low = min(0.0, *(float(line.x_P.min()) for line in lines))
    x_low, x_high = x_low - 0.01 * (x_high - x_low), x_high + 0.02 * (x_high - x_low)
    is_log = not from_zero and float(y_P.min()) > 0 and math.log(y_P.max()) - math.log(y_P.min()) > _LOG_SPAN
    low, high, note = _range(y_P, from_zero=from_zero, is_log=is_log)
    x_ticks, y_ticks = _ticks(x_low, x_high, 6), _log_ticks(low, high) if is_log else _ticks(low, high, 5)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def across(x: float) -> float:
        return (x - x_low) / (x_high - x_low) * width

    def down(y: float) -> float:
        y, bottom, top = (math.log(value) if is_log else value for value in (y, low, high))
        return (1 - (y - bottom) / (top - bottom)) * height

    parts: list[Markup] = []
    for tick in y_ticks:
        y = round(_TOP + down(tick), 1)
        parts.append(element("line", class_="grid", x1=_LEFT, x2=_LEFT + width, y1=y, y2=y))
        parts.append(element("text", _number(tick), class_="tick end", x=_LEFT - 7, y=y, dy="0.35em"))
    for tick in x_ticks:
        x = round(_LEFT + across(tick), 1)
        parts.append(element("line", class_="grid", x1=x, x2=x, y1=_TOP, y2=_TOP + height))
        parts.append(element("text", _number(tick), class_="tick mid", x=x, y=_TOP + height + 16))
    parts.append(element("text", x_label, class_="tick mid", x=_LEFT + width / 2, y=_HEIGHT - 6))
    drawn = [_draw_line(line, across, down, most) for line in lines if len(line.x_P)]
    parts.append(element("svg", *drawn, x=_LEFT, y=_TOP, width=width, height=height))  # clips lines at the axes
    picture = element(
        "svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=f"{title} over {x_label}"
    )
    scale = ", logarithmic" if is_log else ""
    caption = element("figcaption", element("strong", title), f"{scale}{note}")
    return element("figure", caption, picture, class_="chart")


def _draw_line(line: Line, across: _Scale, down: _Scale, most: int) -> Markup:
    x_P, low_P, mean_P, high_P = thin(line.x_P, line.y_P, most)
    points = _points(x_P, mean_P, across, down)
    parts = [element("title", line.label), element("path", d=f"M{'L'.join(points)}", class_="line")]
    if len(points) < len(line.x_P):
        around = _points(x_P, high_P, across, down) + _points(x_P, low_P, across, down)[::-1]
        parts.insert(1, element("path", d=f"M{'L'.join(around)}Z", class_="band"))
    if len(points) <= _MARKED:  # a zero-length line with round ends is a dot
        parts.append(element("path", d="".join(f"M{point}h0" for point in points), class_="dots"))
    return element("g", *parts, class_=line_class(line.place))


def _points(x_P: Array, y_P: Array, across: _Scale, down: _Scale) -> list[str]:
    return [f"{across(x):.1f} {down(y):.1f}" for x, y in zip(x_P.tolist(), y_P.tolist(), strict=True)]


def _range(y_P: Array, *, from_zero: bool, is_log: bool) -> tuple[float, float, str]:
    """Return the ends of the y axis, and a text about the values above it."""
    low, high, note = float(y_P.min()), float(y_P.max()), ""
    if is_log:
        return low / 1.1, high * 1.1, note
    if from_zero:
        low = min(low, 0.0)
    most = float(np.quantile(y_P, _CALM_FROM_ZERO if from_zero else _CALM))
    if len(y_P) >= 20 and most > low and high - low > _CUT * (most - low):
        above = low + 1.3 * (most - low)
        note = f", {int((y_P > above).sum())} above the axis (highest {_number(high)})"
        high = above
    low, high = _wide(low, high)
    return (low if from_zero else low - 0.04 * (high - low)), high + 0.04 * (high - low), note


def _wide(low: float, high: float) -> tuple[float, float]:
    """Return the ends of an axis, moved apart if they are equal."""
    if high - low > 1e-12 * max(abs(low), abs(high)) and high > low:
        return low, high
    pad = abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def _ticks(low: float, high: float, num: int) -> list[float]:
    """Return round numbers between two ends."""
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(decades) // 6)
    factors = (1, 2, 5) if len(decades) <= 3 else (1,)
    ticks = [factor * 10.0**decade for decade in decades[::every] for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _number(value: float) -> str:
    """Format a number in few characters, with k, M or G for large ones."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size * 10 <= abs(value) < 1e13:
            return f"{value / size:.4g}{unit}"
    return f"{0.0 if abs(value) < 1e-300 else value:.4g}"
