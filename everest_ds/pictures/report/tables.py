"""Draw tables: plain ones, and runs side by side with the differing rows marked."""

from collections.abc import Mapping, Sequence

from everest_ds.pictures.report.curves import line_class
from everest_ds.pictures.report.markup import Markup, element

MISSING = "\N{EN DASH}"
MOST_ROWS = 400


def swatch(place: int) -> Markup:
    """Draw a sample of a run's line in the curves, for legends."""
    path = element("path", d="M1 6h30", class_="line")
    return element("svg", path, class_=f"swatch {line_class(place)}", viewBox="0 0 32 12", aria_hidden="true")


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = ()) -> Markup:
    """Draw a table that can scroll sideways; columns in ``numeric`` are aligned to the right."""

    def cell(tag: str, place: int, text: str) -> Markup:
        return element(tag, text, class_="number" if place in numeric else None)

    head = element("tr", *[cell("th", place, text) for place, text in enumerate(header)])
    body = [element("tr", *[cell("td", place, text) for place, text in enumerate(row)]) for row in rows]
    return _scrolling(element("table", element("thead", head), element("tbody", *body)))


def side_by_side(
    labels: Sequence[str], columns: Sequence[Mapping[str, str]], *, name: str, marks: bool = True
) -> Markup:
    """Draw a table of named texts with one column a run.

    Args:
        labels: Labels of the runs.
        columns: Texts by name, for each run.
        name: Name of the table, one word, unique on the page.
        marks: Whether to mark rows in which runs differ, with a box that hides the other rows.
    """
    names = list(dict.fromkeys(key for column in columns for key in column))
    left_out = len(names) - MOST_ROWS
    marks = marks and len(columns) > 1
    rows, num_different = [], 0
    for key in names[:MOST_ROWS]:
        texts = [column.get(key, MISSING) for column in columns]
        differs = marks and len(set(texts)) > 1
        num_different += differs
        mark = element("span", "≠", title="the runs differ", class_="mark") if differs else None
        cells = [element("th", key, mark, scope="row"), *[element("td", text) for text in texts]]
        rows.append(element("tr", *cells, class_=("differs" if differs else "same") if marks else None))
    heads = [element("th", swatch(place), label, scope="col") for place, label in enumerate(labels)]
    head, body = element("thead", element("tr", element("td"), *heads)), element("tbody", *rows)
    table = element("table", head, body, class_="runs")
    more = element("p", f"{left_out} more are left out") if left_out > 0 else None
    if not marks:
        return element("div", _scrolling(table), more)
    box = element("input", type="checkbox", id=f"only-{name}", class_="only", checked=num_different > 0)
    said = f"only the {num_different} of {len(rows)} rows in which runs differ"
    return element("div", box, element("label", said, for_=f"only-{name}"), _scrolling(table), more)


def _scrolling(table: Markup) -> Markup:
    return element("div", table, class_="scroll", tabindex="0")
