"""Parsing one line of a list of videos: path, label, and perhaps a window in seconds.

Place in the flow: line of text -> `parse_line` -> ListLine -> row (`lists.video_list`). Any other line is refused
with a guess what it is: a header row, a frame folder, a comment, swapped columns.
"""

import re
from typing import NamedTuple

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
)

EXPECTED = (
    "expected `path label` with an integer label (0 where there are no classes), or `path label start end` with a "
    "window in seconds"
)

_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_FIELD = rf'(?:{_NUMBER}|"{_NUMBER}")'
# The last field of a line, if it is a number.
_LAST = re.compile(rf"^(?P<rest>.*[^\s,])(?P<separator>[\s,]+)(?P<field>{_FIELD})$")
# A path in double quotes; quotes in it are doubled, as in CSV files. Older versions did not double them.
_QUOTED = re.compile(rf'^"(?P<path>(?:[^"]|"")+)"(?P<fields>(?:[\s,]+{_FIELD})*)$')
_QUOTED_LOOSELY = re.compile(rf'^"(?P<path>.+)"(?P<fields>(?:[\s,]+{_FIELD})*)$')
_LABEL = re.compile(r"^[-+]?[0-9]+(?:\.0*)?$")
_MOST_LABEL = 2**31 - 1
# int() refuses numbers of thousands of digits.
_MOST_DIGITS = 100
_NO_TIME = re.compile(r"[\s,](?P<word>[-+]?(?:nan|inf|infinity))$", re.IGNORECASE)

_OTHER_SEPARATOR = re.compile(rf"(?:{'|'.join(map(re.escape, VIDEO_SUFFIXES))})\"?\s*(?P<mark>[;|])", re.IGNORECASE)
_JSON = re.compile(r"[\[{]\s*(?:[\"\[{]|$)")
_NUMBERED = re.compile(r"^\"?(?P<number>[0-9]{1,10})\"?\s*[,\t]\s*\S")
_WORD = (
    "begin|category|class|clip|duration|end|file|filename|filepath|frames|gt|id|idx|index|label|labels|name|num|path|"
    "paths|sec|split|start|stop|subset|target|time|total|uid|url|video|videos|youtube"
)
# Longer fields are not column names, and would make the pattern backtrack for too long.
_MOST_COLUMN = 40
_COLUMN = re.compile(rf"(?:n_|x_)?(?:{_WORD})(?:_?(?:{_WORD})|_s)*|x|y", re.IGNORECASE)


class LineError(ValueError):
    """The line is not a row of a list; the message says what it looks like and what to do."""


class ListLine(NamedTuple):
    """Content of a line: path without quotes, class, and an unchecked window in seconds (None for no window)."""

    path: str
    label: int
    start_s: float | None = None
    end_s: float | None = None


class _Split(NamedTuple):
    """A path and the numbers after it, as text; ``paths`` has the text before each number."""

    path: str
    numbers: list[str]
    paths: list[str]
    is_quoted: bool


def parse_line(line: str, number: int) -> ListLine:
    """Return the content of a line.

    Spaces, tabs or a comma separate fields. A line ends in one number (label) or in three (label, start and end);
    the path before them may contain spaces and commas. A path whose last word is a number must be in double quotes.
    Without quotes, more than three numbers are accepted only if the last two have a decimal point: these are the
    window, the number before them is the label, and the others belong to the path.

    Args:
        line: The line, not blank.
        number: Its number, from 1.

    Raises:
        LineError: The line is not a row of a list.
    """
    line = line.strip()
    if re.match(r"#\s", line):
        raise LineError("looks like a comment; remove it, or put the path in double quotes")
    if _JSON.match(line):
        raise LineError(f"looks like JSON; {EXPECTED}, a line for each video")
    split = _split(line.rstrip(" \t,"))
    if not split.is_quoted:
        _require_plain(split, number)
    numbers, path = split.numbers, split.path
    if not numbers:
        raise LineError(_explain_no_label(line, number))
    is_open = not split.is_quoted and not path.lower().endswith(VIDEO_SUFFIXES)
    if len(numbers) > 3 and is_open and all("." in text for text in numbers[-2:]):
        numbers, path = numbers[-3:], split.paths[-3]
    if len(numbers) == 2:
        raise LineError(_explain_two(numbers))
    if len(numbers) > 3:
        raise LineError(
            f"has {len(numbers)} numbers after {path!r}; {EXPECTED}. Put a path that ends in a number in double "
            "quotes"
        )
    label = _parse_label(numbers)
    if len(numbers) == 1:
        return ListLine(path, label)
    return ListLine(path, label, float(numbers[1]), float(numbers[2]))


def needs_quotes(path: str) -> bool:
    """Return whether a path must be in quotes in a list to be read as itself."""
    try:
        return parse_line(f"{path} 0", 1).path != path
    except LineError:
        return True


def _split(line: str) -> _Split:
    match = _QUOTED.match(line)
    if match is not None:
        path = match["path"].replace('""', '"')
    else:
        match = _QUOTED_LOOSELY.match(line)
        path = "" if match is None else match["path"]
    if match is not None:
        numbers = [text.strip('"') for text in re.split(r"[\s,]+", match["fields"]) if text]
        if re.search(r",\s*,", match["fields"]):
            raise LineError(f"has an empty field; {EXPECTED}")
        return _Split(path, numbers, [path] * len(numbers), is_quoted=True)
    rest: list[str] = []
    paths: list[str] = []
    while (last := _LAST.match(line)) is not None:
        if last["separator"].count(",") > 1:
            raise LineError(f"has an empty field; {EXPECTED}")
        line = last["rest"]
        rest.insert(0, last["field"].strip('"'))
        paths.insert(0, line)
    return _Split(line, rest, paths, is_quoted=False)


def _require_plain(split: _Split, number: int) -> None:
    """Raise LineError if an unquoted path contains other things than a path, such as fields or numbers."""
    other = _OTHER_SEPARATOR.search(split.path)
    if other is not None:
        raise LineError(f"separates its fields by {other['mark']!r}; use a space, a tab or a comma")
    if not split.numbers:
        return
    no_time = _NO_TIME.search(split.path)
    if no_time is not None:
        raise LineError(
            f"has {no_time['word']!r} for a time; {EXPECTED}. Put a path that ends in this word in double quotes"
        )
    if number == 1 and re.fullmatch("[0-9]+", split.path):
        raise LineError(
            f"looks like a header row of numbers; remove it. If {split.path!r} is a file, put it in double quotes"
        )
    numbered = _NUMBERED.match(split.path)
    if numbered is not None and int(numbered["number"]) in (number - 2, number - 1, number):
        raise LineError(
            f"begins with its own number, like a row with an index; {EXPECTED}. Put a path that begins with this "
            "number in double quotes"
        )


def _parse_label(numbers: list[str]) -> int:
    """Return the label, the first of one or three numbers."""
    text, times = numbers[0], numbers[1:]
    if not _LABEL.match(text):
        raise LineError(f"has the label {text}, which is not a whole number; {EXPECTED}")
    if "." in text and times and not all("." in time for time in times):
        raise LineError(f"has the label {text} with a decimal point and times without; {EXPECTED}, in this order")
    digits = text.partition(".")[0]
    label = int(digits) if len(digits) < _MOST_DIGITS else _MOST_LABEL + 1
    if abs(label) > _MOST_LABEL:
        raise LineError(f"has the label {text}; expected one below {_MOST_LABEL + 1}")
    return label


def _explain_two(numbers: list[str]) -> str:
    if any("." in text for text in numbers):
        return f"has two numbers after the path; a window needs both times: {EXPECTED}"
    return (
        "looks like a row of frame folders (path, number of frames, label); use `path label` or `path label start "
        "end`, with a path that ends in a number in double quotes"
    )


def _explain_no_label(line: str, number: int) -> str:
    """Return a guess what a line is that does not end in a number."""
    fields = [field.strip("\"'").strip() for field in re.split(r"[\s,;|]+", line)]
    named = [field for field in fields if field]
    if len(named) > 1 and all(_COLUMN.fullmatch(field.lstrip("#")[:_MOST_COLUMN]) for field in named):
        return f"looks like a header row (columns {', '.join(named)}); remove it"
    if len(named) > 1 and re.fullmatch("-?[0-9]+", named[0]):
        return f"begins with a number and does not end in one, as if label and path were swapped; {EXPECTED}"
    last = named[-1] if len(named) > 1 else ""
    if re.search("[0-9]:[0-9]", last):
        return f"ends in {last!r}, which is not a number of seconds; {EXPECTED}"
    if not last or _looks_like_file(last) or last.lower() in ("nan", "none", "null"):
        return f"has no label; {EXPECTED}"
    hint = ". If the line names the columns, remove it" if number == 1 else ""
    return (
        f"has no label: its last field {last!r} is not a number; {EXPECTED}. Put class names into classes.txt, one "
        f"a line in the order of the labels{hint}"
    )


def _looks_like_file(field: str) -> bool:
    return field.lower().endswith(VIDEO_SUFFIXES) or "/" in field
