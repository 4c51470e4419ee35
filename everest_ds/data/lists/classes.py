"""Classes: their number and names, and checks of the lists' labels against them.

Place in the flow: rows of the lists and a file of names -> `Classes`. Needs no torch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from everest_ds.data.lists.packed_rows import packed
from everest_ds.data.lists.video_row import VideoRow
from everest_ds.errors import UserError

NAMES_FILE = "classes.txt"
_NUM_SHOWN = 5
# More classes than any dataset has; a larger label must be a mistake.
_MOST_COUNTED = 1_000_000


@dataclass(frozen=True)
class Classes:
    """The classes of a run: 0 to ``num - 1``.

    Attributes:
        num: Number of classes.
        names: Names by label; None if there are none.
    """

    num: int
    names: tuple[str, ...] | None = None

    def describe(self, label: int) -> str:
        """Return a class in words, with its name if it has one."""
        return f"class {label}" if self.names is None else f"class {label} ({self.names[label]})"

    def describe_all(self, labels: Sequence[int]) -> str:
        """Return classes in words; at most the first five, and the number of the others."""
        shown = ", ".join(self.describe(label) for label in labels[:_NUM_SHOWN])
        rest = len(labels) - _NUM_SHOWN
        return f"{shown} and {rest} more" if rest > 0 else shown

    def untrained(self, trained_labels: Collection[int]) -> list[int]:
        """Return the classes that have no training video."""
        return [label for label in range(self.num) if label not in trained_labels]


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read the names of the classes, one a line, in the order of the labels.

    Raises:
        UserError: The file is missing or empty, a line is blank, or a name repeats.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the class names {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the class names {path} are not UTF-8 text: {error.reason}") from error
    lines: dict[str, int] = {}
    for number, line in enumerate(text.rstrip().splitlines(), start=1):
        name = line.strip()
        if not name:
            raise UserError(f"{path}, line {number} is blank; expected one class name a line, in the labels' order")
        if name in lines:
            raise UserError(f"{path}, line {number}: {name!r} is already in line {lines[name]}; make names unique")
        lines[name] = number
    if not lines:
        raise UserError(f"the class names {path} are empty; expected one name a line")
    return tuple(lines)


def find_class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the names in a folder's classes.txt; None if there is no such file."""
    path = folder / NAMES_FILE
    return read_class_names(path) if path.is_file() else None


def resolve_classes(
    rows: Sequence[VideoRow], train_list: Path, class_names: str | None, num_classes: int | None
) -> Classes:
    """Return the classes of a training list.

    Their number is ``num_classes`` if given, else the number of names, else the largest label plus 1. The names
    come from the file ``class_names`` if given, else from classes.txt beside the list if there is one.

    Raises:
        UserError: The file of names is wrong, ``num_classes`` contradicts it, a label is out of range, or there is
            only one class.
    """
    beside = train_list.parent / NAMES_FILE
    source = Path(class_names) if class_names is not None else beside if beside.is_file() else None
    names = None if source is None else read_class_names(source)
    if names is not None and num_classes is not None and len(names) != num_classes:
        way_out = "" if class_names is not None else " or name another file by data.class_names"
        raise UserError(
            f"data.num_classes={num_classes}, but {source} names {len(names)} classes; leave out "
            f"data.num_classes{way_out}"
        )
    if num_classes is not None:
        num, origin = num_classes, f"data.num_classes={num_classes}"
    elif names is not None:
        num, origin = len(names), f"{source} names {len(names)}"
    else:
        largest = rows[int(packed(rows).labels.argmax())]
        num, origin = largest.label + 1, f"the largest label is {largest.label}"
        if num > _MOST_COUNTED:
            raise UserError(
                f"{_place(largest, train_list)}: label {largest.label} would mean {num} classes; correct it, or "
                "set data.num_classes"
            )
    classes = Classes(num, names)
    _require_range(rows, train_list, classes, origin)
    if num < 2:
        raise UserError(
            f"{train_list} has only one class ({origin}), classification needs two; label the list, or set "
            "data.num_classes"
        )
    return classes


def require_known_labels(
    rows: Sequence[VideoRow], source: Path, classes: Classes, trained_labels: Collection[int]
) -> None:
    """Check the labels of a list for scoring against the run's classes and the labels of its training list.

    Raises:
        UserError: A label is out of range, or its class has no training video.
    """
    _require_range(rows, source, classes, f"the run has {classes.num} classes")
    labels = packed(rows).labels
    untrained = np.setdiff1d(labels, np.fromiter(trained_labels, np.int64))
    if len(untrained):
        first = rows[int(np.argmax(np.isin(labels, untrained)))]
        raise UserError(
            f"{_place(first, source)}: {first.path} has {classes.describe(first.label)}, but the training list has "
            f"no video of {classes.describe_all(untrained.tolist())}; add some to it, or remove their rows"
        )


def _require_range(rows: Sequence[VideoRow], source: Path, classes: Classes, origin: str) -> None:
    allowed = f"0 to {classes.num - 1} ({origin})" if classes.num else "0 and above"
    labels = packed(rows).labels
    outside = (labels < 0) | (labels >= classes.num)
    if outside.any():
        row = rows[int(np.argmax(outside))]
        raise UserError(
            f"{_place(row, source)}: label {row.label} of {row.path} is not in the range {allowed}; correct the "
            "list, or data.num_classes and data.class_names"
        )


def _place(row: VideoRow, source: Path) -> str:
    return str(source) if row.line is None else f"{source}, line {row.line}"
