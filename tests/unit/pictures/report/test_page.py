"""The page about runs: valid markup for any text, curves, tables and pictures."""

from __future__ import annotations

import base64
import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from everest_ds.pictures.report.confusion import MOST_PAIRS, draw_confusion_tables, worst_pairs
from everest_ds.pictures.report.contents import BadDraws, Curve, ReportedRun, ScoredList, StoredPicture
from everest_ds.pictures.report.curves import Line, draw_chart, line_class, thin
from everest_ds.pictures.report.embedding import data_uri
from everest_ds.pictures.report.page import draw_page, name_runs
from everest_ds.pictures.report.tables import side_by_side

NASTY = "</td><script>alert(1)</script>\" onload='x' & \udcff\u202e\n\0 é"
VOID = {"img", "input", "link", "meta"}


class Checker(HTMLParser):
    """A parser that requires tags to be closed in order, and collects attributes and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def curve(values: list[float]) -> Curve:
    return Curve(steps_P=np.arange(1.0, len(values) + 1), values_P=np.array(values))


def nasty_run(folder: Path) -> ReportedRun:
    texts = {NASTY: NASTY}
    scored = ScoredList(
        name=NASTY, facts=texts, class_names=[NASTY] * 2, confusion=[[1, 2], [3, 4]], unreadable=NASTY
    )
    return ReportedRun(
        path=folder / "a <b>",
        state=NASTY,
        facts=texts,
        curves={"loss": curve([3.0, 2.0])},
        speed=texts,
        settings=texts,
        environment=texts,
        pictures=[StoredPicture(path=folder / "missing.png", caption=NASTY)],
        bad=BadDraws(count=1, reasons=[(NASTY, 1)], first=[{"path": NASTY}]),
        events=[("now", 1, NASTY)],
        hangs=[(NASTY, f"first line\n{NASTY}")],
        scores=[scored],
        notes=[NASTY],
    )


def test_page_is_whole_html_and_loads_nothing_whatever_the_texts_are(tmp_path: Path) -> None:
    plain = ReportedRun(path=tmp_path / "b", state="finished", facts={"state": "finished"})
    page = draw_page([nasty_run(tmp_path), plain], written=NASTY)
    found = Checker(page)
    assert page.isprintable() is False  # line breaks between elements
    assert all(part.isprintable() for part in page.split("\n"))
    assert page.encode("utf-8")  # bytes that are not UTF-8 are escaped
    assert "script" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    loaded = [value for name, value in found.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert loaded
    assert all(value.startswith(("data:", "#")) for value in loaded)
    assert not re.search(r"url\(|@import|https?:", page)
    assert any(name == "content" and value.startswith("default-src 'none'") for name, value in found.attributes)
    assert sum("<script>alert(1)</script>" in text for text in found.texts) > 15  # shown as text


def test_page_of_a_run_without_anything_says_what_is_missing(tmp_path: Path) -> None:
    page = draw_page([ReportedRun(path=tmp_path, state="empty", facts={"state": "empty: no step"})], written="now")
    Checker(page)
    for said in ("No metrics were", "No run has pictures", "No speed", "Nothing was scored", "No settings"):
        assert said in page


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/run", "y/run", "y/z"], ["x/run", "y/run", "z"]),
        (["p/x/run", "q/x/run"], ["p/x/run", "q/x/run"]),
    ],
)
def test_runs_are_named_by_the_shortest_ends_that_differ(paths: list[str], names: list[str]) -> None:
    assert name_runs(list(map(Path, paths))) == names


def test_thinned_curve_keeps_extremes_and_means() -> None:
    y_P = np.random.default_rng(0).normal(size=10_001)
    y_P[[17, 9_000]] = 50, -60
    x_P = np.arange(10_001.0)
    thin_P, low_P, mean_P, high_P = thin(x_P, y_P, 100)
    assert len(thin_P) == 100
    assert (low_P.min(), high_P.max()) == (-60, 50)
    edges = [round(np.floor(10_001 * i / 100)) for i in range(101)]
    for i, (begin, end) in enumerate(itertools.pairwise(edges)):
        assert mean_P[i] == pytest.approx(sum(y_P[begin:end]) / (end - begin))
        assert begin <= thin_P[i] < end
    same = thin(x_P[:7], y_P[:7], 100)
    assert all(np.array_equal(part, y_P[:7]) for part in same[1:])


def line(values: list[float], place: int = 0) -> Line:
    return Line(label="run", place=place, x_P=np.arange(1.0, len(values) + 1), y_P=np.array(values))


def test_chart_places_points_by_its_axes() -> None:
    chart = draw_chart("loss", [line([0.0, 5.0, 10.0])], x_high=3, x_label="step", from_zero=True)
    (path,) = re.findall(r'<path d="M([^"]*)" class="line">', chart)
    x, y = zip(*(map(float, point.split()) for point in path.split("L")), strict=True)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.11)
    assert y[0] > y[1] > y[2] >= 0  # higher values are drawn higher
    ticks = re.findall(r'<text class="tick end"[^>]*>([^<]*)<', chart)
    assert ticks == ["0", "5", "10"]


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0], [0.0] * 50, [1e-300, 1e200], [-5.0, -5.0], [1e-12, 1.0], [1e15, 2e15], [5.0, 5.0 + 1e-14]],
)
@pytest.mark.parametrize("from_zero", [True, False])
def test_chart_stands_any_numbers(values: list[float], from_zero: bool) -> None:
    chart = draw_chart("x", [line(values)], x_high=len(values), x_label="step", from_zero=from_zero)
    Checker(chart)
    assert not re.search(r"\bnan\b|\binf\b", chart)


def test_chart_says_what_its_axis_leaves_out() -> None:
    chart = draw_chart("wait", [line([900.0] + [5.0] * 40)], x_high=41, x_label="step", from_zero=True)
    assert "1 above the axis (highest 900)" in chart
    assert "logarithmic" in draw_chart("loss", [line([100.0, 1.0])], x_high=2, x_label="step")


def test_lines_of_many_runs_differ() -> None:
    assert len({line_class(place) for place in range(32)}) == 32


def test_table_marks_rows_that_differ() -> None:
    table = side_by_side(["a", "b"], [{"x": "1", "y": "1"}, {"x": "1", "y": "2", "z": "3"}], name="t")
    rows = dict(re.findall(r'<tr class="(\w+)"><th scope="row">(\w)', table))
    assert rows == {"same": "x", "differs": "z"}  # of each class, the last row
    assert table.count("≠") == 2
    assert "only the 2 of 3 rows" in table
    assert "≠" not in side_by_side(["a"], [{"x": "1"}], name="t")


def test_confusion_names_the_worst_pairs_and_shows_a_matrix_of_few_classes_only() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 9, (400, 400))
    flat = sorted(((-n, i, j) for (i, j), n in np.ndenumerate(counts) if i != j and n))[:MOST_PAIRS]
    assert worst_pairs(counts.tolist()) == [(i, j, -n) for n, i, j in flat]
    names = [f"class {label}" for label in range(400)]
    assert len(draw_confusion_tables(counts.tolist(), names)) < 20_000
    assert "matrix" not in draw_confusion_tables(counts.tolist(), names)
    assert draw_confusion_tables(counts[:5, :5].tolist(), names[:5]).count('class="cell"') == 25
    assert "No video" in draw_confusion_tables([[3, 0], [0, 0]], ["a", "b"])


def test_pictures_are_embedded_within_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (900, 1800, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    whole, small = data_uri(path, 10**8), data_uri(path, 150_000)
    assert base64.b64decode(whole.removeprefix("data:image/png;base64,")) == path.read_bytes()
    data = base64.b64decode(small.removeprefix("data:image/jpeg;base64,"))
    assert len(data) <= 150_000
    with Image.open(io.BytesIO(data)) as image:
        assert image.width / image.height == pytest.approx(2, rel=0.01)
    path.write_bytes(path.read_bytes()[:5000])
    page = draw_page(
        [ReportedRun(path=tmp_path, state="x", facts={}, pictures=[StoredPicture(path=path, caption="c")])],
        written="now",
    )
    assert "noise.png cannot be shown" in page
