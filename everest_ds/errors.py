"""The error for faults that the user can fix. A leaf: imports nothing of the project."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A fault in the user's input: the message says what is wrong, what was expected, and what to do.

    The command line prints the message without a traceback and exits with code 2. Any other exception is a
    bug and keeps its traceback.
    """


def nearest_hint(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the most similar choice, else ``"; known: a, b, c"``."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def escaped(text: str) -> str:
    """Return a name from an untrusted file with its unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
