"""Draw the page: one HTML file that contains its style and pictures; its policy forbids requests and scripts."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from everest_ds.errors import escaped
from everest_ds.pictures.report import sections
from everest_ds.pictures.report.contents import ReportedRun
from everest_ds.pictures.report.markup import Markup, element, joined
from everest_ds.pictures.report.style import STYLE
from everest_ds.pictures.report.tables import swatch

PROLOGUE = "<!doctype html>\n<!-- written by everest report -->\n"
"""The first lines of every page; `everest report` replaces only files that begin so."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_SECTIONS: dict[str, Callable[[sections.Labelled], Markup]] = {
    "Overview": sections.draw_overview,
    "Curves": sections.draw_curves_of,
    "Scores": sections.draw_scores,
    "Pictures": sections.draw_pictures,
    "Speed and memory": sections.draw_speed,
    "What happened": sections.draw_troubles,
    "Settings": sections.draw_settings,
    "Environment": sections.draw_environment,
}


def draw_page(runs: Sequence[ReportedRun], *, written: str) -> str:
    """Return the page as printable text, whatever characters file names contain.

    Args:
        runs: At least one run.
        written: Line that says when and by which version the page was written.
    """
    labelled = list(zip(name_runs([run.path for run in runs]), runs, strict=True))
    title = labelled[0][0] if len(runs) == 1 else f"{len(runs)} runs"
    states = [
        element("li", swatch(place), element("strong", label), " ", element("span", run.state, class_=_state(run)))
        for place, (label, run) in enumerate(labelled)
    ]
    links = [element("a", name, href=f"#{_anchor(name)}") for name in _SECTIONS]
    header = element("header", element("h1", title), element("ul", *states, class_="legend"), element("p", written))
    body = [
        element("section", element("h2", name), draw(labelled), id=_anchor(name))
        for name, draw in _SECTIONS.items()
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", f"everest: {title}"),
        element("style", Markup(STYLE)),
    )
    page = element("html", head, element("body", header, element("nav", *links), joined(body)), lang="en")
    return f"{PROLOGUE}{page}\n"


def name_runs(paths: Sequence[Path]) -> list[str]:
    """Return the shortest distinct ends of paths: the last part, or more of it if two runs share a name."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = 1
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        names.append(escaped(str(Path(*own[-length:]))))
    return names


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _state(run: ReportedRun) -> str:
    """Return the CSS classes that colour a state."""
    kind = {"finished": "good", "evaluation": "good", "training": "busy"}.get(run.state, "bad")
    return f"state {kind}"
