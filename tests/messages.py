"""Texts of `UserError`s: recorded while tests run, written to a file for reading, and checked for length.

With `pytest --messages FILE` every process of the run, forks included, records the texts that the package raises.
At the end the distinct texts are written to FILE, the longest first, and the run fails if one is too long.
Processes that a launcher starts are not recorded.
"""

import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from everest_ds.errors import UserError

VARIABLE = "EVEREST_TEST_MESSAGES"
"""Environment variable with the folder of the records; set in all processes of a run that records."""

MAX_CHARACTERS, MAX_SENTENCES = 200, 2
WITH_A_LIST = (
    "; known: ", ": expected one of", "expected `path label`", "ends in one of .3gp", "is not in timm's notation",
)  # fmt: skip
"""Parts of messages that may be longer, because they list names or what a line may contain."""

_MAX_SHOWN = 8


def record_if_asked() -> None:
    """Record the texts of this process and its forks, if the environment names a folder for them."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        return
    seen: set[tuple[str, str]] = set()

    def init(self: UserError, *args: Any) -> None:
        ValueError.__init__(self, *args)
        frame = sys._getframe(1)
        module = frame.f_globals.get("__name__", "")
        key = (f"{module}.{frame.f_code.co_name}", normalise(str(self)))
        if module.startswith("everest_ds.") and key not in seen:
            seen.add(key)
            with (Path(folder) / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(key) + "\n")

    UserError.__init__ = init  # type: ignore[method-assign]


def normalise(text: str) -> str:
    """Replace absolute folders by /data and numbers by N, so that the text is equal in all runs."""
    return re.sub(r"(?<!\w)\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)", "N", re.sub(r"(?:/[^/\s'\"]+)+/", "/data/", text))


def count_sentences(text: str) -> int:
    """Count sentences: a stop ends one if a capital, a backtick or a bracket follows."""
    return len(re.findall(r"(?<!\.)(?<!e\.g)[.!?][)'\"]?\s+(?=[A-Z`(])", text)) + 1


def is_too_long(text: str) -> bool:
    """Return whether a text has too many characters or sentences."""
    return len(text) > MAX_CHARACTERS or count_sentences(text) > MAX_SENTENCES


def write_report(folder: Path, target: Path) -> list[str]:
    """Write a folder's recorded texts, at most ``_MAX_SHOWN`` per function; return those that are too long."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in folder.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            place, text = json.loads(line)
            found[place].add(text)
    lines = []
    for place, texts in found.items():
        for text in sorted(texts, key=len, reverse=True)[:_MAX_SHOWN]:
            lines.append(f"{len(text):5}  {text}  [{place}, {len(texts)} texts]\n")
    target.write_text("".join(sorted(lines, reverse=True)), encoding="utf-8")
    every = {text for texts in found.values() for text in texts if not any(part in text for part in WITH_A_LIST)}
    return sorted(filter(is_too_long, every))
