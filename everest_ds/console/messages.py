"""Messages of a running command: lines with a level, through `logging`. A leaf.

`say` is for information: progress, what was loaded, where files are. The results of a command (labels, scores,
tables) are printed. `VERBOSITY` describes the levels.
"""

import logging
from collections.abc import Callable
from typing import TextIO

from everest_ds.errors import escaped

VERBOSITY = "-q: only results, warnings and errors, no progress and no file names; -v: details, too."
"""A line in the help of commands."""
LOGGER = logging.getLogger("everest_ds")
_WARNING = "warning: "


class _Lines(logging.Handler):
    """Prints each message on its own line or lines."""

    def __init__(self) -> None:
        super().__init__()
        self.write: Callable[[str], None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message. A reader that has ended raises an error in the caller, as with `print`."""
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
    """Print a message: as a warning if it begins with ``warning: ``, else as information."""
    LOGGER.log(logging.WARNING if text.startswith(_WARNING) else logging.INFO, "%s", text)


def set_verbosity(verbosity: int) -> None:
    """Show only warnings (below 0), also information (0), or also details (above 0)."""
    LOGGER.setLevel(logging.WARNING if verbosity < 0 else logging.INFO if verbosity == 0 else logging.DEBUG)


def send_libraries_to(stream: TextIO | None) -> None:
    """Send log messages of libraries that have no handler to a stream."""
    logging.lastResort = logging.StreamHandler(stream)
    logging.lastResort.setLevel(logging.WARNING)


def is_quiet() -> bool:
    """Return whether only warnings are shown."""
    return not LOGGER.isEnabledFor(logging.INFO)


def is_verbose() -> bool:
    """Return whether details and the output of libraries are shown."""
    return LOGGER.isEnabledFor(logging.DEBUG)


def write_by(write: Callable[[str], None] | None) -> None:
    """Pass lines to a function, for example one that prints them above a progress bar; None prints them again."""
    _lines.write = write
