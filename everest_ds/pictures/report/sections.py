"""Draw the sections of the page; each covers all runs."""

from collections.abc import Mapping, Sequence

import numpy as np

from everest_ds.pictures.report.confusion import draw_confusion_tables
from everest_ds.pictures.report.contents import CURVES, ReportedRun, ScoredList
from everest_ds.pictures.report.curves import Line, draw_chart
from everest_ds.pictures.report.embedding import data_uri
from everest_ds.pictures.report.markup import Markup, element, joined, preformatted
from everest_ds.pictures.report.tables import plain_table, side_by_side, swatch

MAX_PICTURES_BYTES, MAX_PICTURE_BYTES = 2 * 2**20, 300 * 2**10
"""Size limits of all pictures of a page and of one picture. Base64 adds a third to them."""
MOST_POINTS, FEWEST_POINTS, ALL_POINTS = 500, 40, 30_000
"""Limits of the points of a curve, above and below, and of all curves of a page."""
MOST_OPEN = 3
"""The number of evaluations whose confused classes are unfolded when the page opens."""
_FROM_ZERO = frozenset({"lr", "val/top1", "clips_per_s", "data_wait_ms"})
_ALIKE = 1.5
"""If numbers of steps differ by more than this factor, curves are also drawn over the share of each run's steps."""

Labelled = Sequence[tuple[str, ReportedRun]]


def draw_overview(runs: Labelled) -> Markup:
    """Draw the facts of each run, its state first, and notes about unreadable files."""
    labels = [label for label, _ in runs]
    table = side_by_side(labels, [run.facts for _, run in runs], name="overview", marks=False)
    notes = [element("li", f"{label}: {note}") for label, run in runs for note in run.notes]
    return element("div", table, element("ul", *notes, class_="notes") if notes else None)


def draw_curves_of(runs: Labelled) -> Markup:
    """Draw the curves over steps, and also over the share of each run's steps if runs differ much in length."""
    if not any(run.curves for _, run in runs):
        return element("p", "No metrics were recorded.")
    ends = [_last_step(run) for _, run in runs if run.curves]
    has_shares = len(ends) > 1 and max(ends) > _ALIKE * max(1.0, min(ends))
    num = sum(len(run.curves) for _, run in runs) * (2 if has_shares else 1)
    most = min(MOST_POINTS, max(FEWEST_POINTS, ALL_POINTS // num))
    legend = [element("li", swatch(place), label) for place, (label, run) in enumerate(runs) if run.curves]
    parts = [element("ul", *legend, class_="legend")]
    if has_shares:
        choices = (("axis-step", "over steps", True), ("axis-share", "over the share of each run's steps", False))
        for name, text, is_checked in choices:
            parts.append(element("input", type="radio", name="axis", id=name, checked=is_checked))
            parts.append(element("label", text, for_=name))
    parts.append(element("div", *_draw_charts(runs, most, by_share=False), class_="charts by-step"))
    if has_shares:
        parts.append(element("div", *_draw_charts(runs, most, by_share=True), class_="charts by-share"))
    return element("div", *parts)


def _draw_charts(runs: Labelled, most: int, *, by_share: bool) -> list[Markup]:
    charts, x_high = [], 100.0 if by_share else max(1.0, *(_last_step(run) for _, run in runs))
    for name, title in CURVES.items():
        lines = []
        for place, (label, run) in enumerate(runs):
            if name not in run.curves:
                continue
            curve = run.curves[name]
            x_P = curve.steps_P / max(1.0, _last_step(run)) * 100 if by_share else curve.steps_P
            y_P = curve.values_P * 100 if name == "val/top1" else curve.values_P
            lines.append(Line(label=label, place=place, x_P=np.asarray(x_P), y_P=np.asarray(y_P)))
        if lines:
            x_label = "% of the run's steps so far" if by_share else "optimiser step"
            is_from_zero = name in _FROM_ZERO
            charts.append(
                draw_chart(title, lines, x_high=x_high, x_label=x_label, from_zero=is_from_zero, most=most)
            )
    return charts


def _last_step(run: ReportedRun) -> float:
    return max((float(curve.steps_P[-1]) for curve in run.curves.values()), default=0.0)


def draw_pictures(runs: Labelled) -> Markup:
    """Draw the newest pictures of each run."""
    num = sum(len(run.pictures) for _, run in runs)
    if not num:
        return element("p", "No run has pictures of its clips (RUN/media).")
    max_bytes = min(MAX_PICTURE_BYTES, MAX_PICTURES_BYTES // num)
    parts = []
    for place, (label, run) in enumerate(runs):
        if not run.pictures:
            continue
        shown = []
        for picture in run.pictures:
            caption = element("figcaption", picture.caption)
            try:
                image = element("img", src=data_uri(picture.path, max_bytes), alt=picture.caption)
            except Exception as error:  # Pillow raises many types for damaged files
                image = element("p", f"{picture.path.name} cannot be shown: {error}", class_="notes")
            shown.append(element("figure", caption, image, class_="picture"))
        parts.append(element("div", element("h3", swatch(place), label), element("div", *shown, class_="pictures")))
    return joined(parts)


def draw_speed(runs: Labelled) -> Markup:
    """Draw throughput and memory side by side."""
    measured = [(label, run) for label, run in runs if run.speed]
    if not measured:
        return element("p", "No speed was measured.")
    return side_by_side([label for label, _ in runs], [run.speed for _, run in runs], name="speed", marks=False)


def draw_scores(runs: Labelled) -> Markup:
    """Draw the evaluations of all runs."""
    scored = [(label, one) for label, run in runs for one in run.scores]
    if not scored:
        return element("p", "Nothing was scored: no run has an evaluation of `everest evaluate`.")
    names = list(dict.fromkeys(name for _, one in scored for name in one.facts))
    rows = [[label, one.name, *[one.facts.get(name, "") for name in names]] for label, one in scored]
    parts = [plain_table(["run", "evaluation", *names], rows)]
    pairs = [_draw_confusion_of(label, one, is_open=n < MOST_OPEN) for n, (label, one) in enumerate(scored)]
    return joined([*parts, *pairs])


def _draw_confusion_of(label: str, one: ScoredList, *, is_open: bool) -> Markup:
    summary = element("summary", f"{label}, {one.name}: confused classes")
    if one.confusion is None:
        inner = element("p", "The summary has no confusion matrix.")
    else:
        inner = draw_confusion_tables(one.confusion, one.class_names)
    unreadable = element("p", f"Not scored: {one.unreadable}") if one.unreadable else None
    return element("details", summary, unreadable, inner, open=is_open)


def draw_troubles(runs: Labelled) -> Markup:
    """Draw events, hangs and unreadable draws of each run."""
    parts = []
    for place, (label, run) in enumerate(runs):
        inner = [element("h3", swatch(place), label)]
        if run.events:
            rows = [[when, str(step), text] for when, step, text in run.events]
            inner.append(plain_table(["when", "step", "what happened"], rows, numeric=(1,)))
        if run.bad.count:
            inner.append(element("p", f"{run.bad.count} draws could not be read:"))
            reasons = [[str(count), reason] for reason, count in run.bad.reasons]
            inner.append(plain_table(["draws", "reason"], reasons, numeric=(0,)))
            names = list(run.bad.first[0]) if run.bad.first else []
            first = [[line.get(name, "") for name in names] for line in run.bad.first]
            inner.append(element("details", element("summary", "the first of them"), plain_table(names, first)))
        else:
            inner.append(element("p", "No unreadable draw is recorded."))
        for name, text in run.hangs:
            inner.append(element("details", element("summary", f"report of the hang {name}"), preformatted(text)))
        parts.append(element("div", *inner))
    return joined(parts)


def draw_settings(runs: Labelled) -> Markup:
    """Draw all settings side by side."""
    return _side_by_side_or(runs, [run.settings for _, run in runs], "settings", "No settings were found.")


def draw_environment(runs: Labelled) -> Markup:
    """Draw command, versions and hardware side by side."""
    return _side_by_side_or(
        runs, [run.environment for _, run in runs], "environment", "No environment was recorded."
    )


def _side_by_side_or(runs: Labelled, columns: Sequence[Mapping[str, str]], name: str, nothing: str) -> Markup:
    if not any(columns):
        return element("p", nothing)
    return side_by_side([label for label, _ in runs], columns, name=name)
