"""Draw which classes are confused: the most frequent pairs, and the matrix if there are few classes."""

import heapq
from collections.abc import Sequence

from everest_ds.pictures.report.markup import Markup, element
from everest_ds.pictures.report.tables import plain_table

MOST_PAIRS, MOST_CLASSES = 20, 24
"""The number of pairs that are listed, and of classes up to which the whole matrix is shown."""

Counts = Sequence[Sequence[int]]


def worst_pairs(confusion: Counts) -> list[tuple[int, int, int]]:
    """Return true class, predicted class and count of the most confused pairs, most frequent first."""
    mistakes = (
        (-count, true, predicted)
        for true, counts in enumerate(confusion)
        for predicted, count in enumerate(counts)
        if count and true != predicted
    )
    return [(true, predicted, -count) for count, true, predicted in heapq.nsmallest(MOST_PAIRS, mistakes)]


def draw_confusion_tables(confusion: Counts, names: Sequence[str]) -> Markup:
    """Draw the most confused pairs, and the matrix if it has few enough classes to read."""
    pairs = worst_pairs(confusion)
    rows = []
    for true, predicted, count in pairs:
        videos = sum(confusion[true])
        rows.append([names[true], names[predicted], f"{count} of {videos}", f"{count / videos:.1%}"])
    num_wrong = sum(sum(counts) - counts[true] for true, counts in enumerate(confusion))
    if not rows:
        return element("p", "No video was assigned to a wrong class.")
    listed = plain_table(["class", "predicted as", "videos", "share of the class"], rows, numeric=(2, 3))
    text = f"Most confused of {len(confusion)} classes ({num_wrong} videos in all):"
    parts = [element("p", text), listed]
    if len(confusion) <= MOST_CLASSES:
        parts.append(_draw_matrix(confusion, names))
    return element("div", *parts)


def _draw_matrix(confusion: Counts, names: Sequence[str]) -> Markup:
    """Draw the counts, each shaded by its share of the true class."""
    numbers = [str(label + 1) for label in range(len(names))]
    heads = [element("th", number, title=name) for number, name in zip(numbers, names, strict=True)]
    rows = []
    for true, counts in enumerate(confusion):
        total = sum(counts) or 1
        cells = [
            element("td", str(count) if count else "", style=f"--share:{count / total * 100:.0f}%", class_="cell")
            for count in counts
        ]
        rows.append(element("tr", element("th", f"{numbers[true]} {names[true]}", scope="row"), *cells))
    table = element(
        "table",
        element("caption", "rows: true classes, columns: predicted ones, shaded by the share of the row"),
        element("thead", element("tr", element("td"), *heads)),
        element("tbody", *rows),
        class_="matrix",
    )
    return element("div", table, class_="scroll", tabindex="0")
