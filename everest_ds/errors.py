"""The error for faults that the user can mend. A leaf: imports nothing of the project."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A fault in what the user gave: the message says what, got, expected, and the way out.

    The command line prints the message without a traceback and exits with code 2; anything else that
    escapes is a defect of ours and keeps its traceback.
    """


def nearest_hint(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the most similar choice, else ``"; known: a, b, c"``."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def escaped(text: str) -> str:
    """Return a name out of a foreign file as it can be printed: control characters and the like are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
