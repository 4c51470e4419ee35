"""What a command says to people while it works: lines with a level, through `logging`. A leaf.

`say` is for news: progress, what was loaded, where files are. Results that a command was asked for (labels, scores,
tables) are printed. `VERBOSITY` has the levels.
"""

import logging
from collections.abc import Callable
from typing import TextIO

from everest_ds.errors import escaped

VERBOSITY = "-q: only results, warnings and errors, no progress and no file names; -v: details, too."
"""For the help of commands."""
LOGGER = logging.getLogger("everest_ds")
_WARNING = "warning: "


class _Lines(logging.Handler):
    """Prints each message as a line of its own, or as several where it has them."""

    def __init__(self) -> None:
        super().__init__()
        self.write: Callable[[str], None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message; a reader that is gone is the caller's affair, as with `print`."""
        text = "\n".join(map(escaped, record.getMessage().split("\n")))
        if self.write is None:
            print(text, flush=True)
        else:
            self.write(text)


_lines = _Lines()
LOGGER.addHandler(_lines)
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False


def say(text: str) -> None:
    """Say something to people: as a warning where it begins with ``warning: ``, else as news."""
    LOGGER.log(logging.WARNING if text.startswith(_WARNING) else logging.INFO, "%s", text)


def set_verbosity(verbosity: int) -> None:
    """Show warnings only (below 0), news as well (0), or details, too (above 0)."""
    LOGGER.setLevel(logging.WARNING if verbosity < 0 else logging.INFO if verbosity == 0 else logging.DEBUG)


def send_libraries_to(stream: TextIO | None) -> None:
    """Send what libraries log, and nobody handles, to a stream."""
    logging.lastResort = logging.StreamHandler(stream)
    logging.lastResort.setLevel(logging.WARNING)


def is_quiet() -> bool:
    """Return whether only warnings are shown."""
    return not LOGGER.isEnabledFor(logging.INFO)


def is_verbose() -> bool:
    """Return whether details are shown, and what libraries print."""
    return LOGGER.isEnabledFor(logging.DEBUG)


def write_by(write: Callable[[str], None] | None) -> None:
    """Hand lines to a function, which puts them above a bar for instance; None prints them again."""
    _lines.write = write
