"""Detection of changed videos in a list, by sizes and checksums of a small sample of them."""

import hashlib
import os
import random
import stat
from collections.abc import Sequence
from pathlib import Path

from everest_ds.data.lists.video_row import VideoRow
from everest_ds.errors import escaped

_NUM_SAMPLED = 16
# A video is identified by its size and this many of its first and last bytes.
_END_BYTES = 1 << 16
_UNKNOWN = "?"


def sample_contents(rows: Sequence[VideoRow]) -> str:
    """Return a fingerprint of some videos of a list, one line each; the sample depends on the list's length only.

    Unreadable files are not an error; their lines say "?".
    """
    places = random.Random(len(rows)).sample(range(len(rows)), min(_NUM_SAMPLED, len(rows)))
    return "\n".join(f"{_identify(rows[place].path)} {rows[place].path.name}" for place in places)


def describe_change(was: str, now: str) -> str | None:
    """Compare two samples of a list; return what changed, or None. Files unreadable in one of them do not count."""
    lines = zip(was.split("\n"), now.split("\n"), strict=False)
    pairs = [(old.split(" ", 1), new.split(" ", 1)) for old, new in lines]
    known = [(old[0], new) for old, new in pairs if _UNKNOWN not in (old[0], new[0])]
    changed = [new[-1] for old, new in known if old != new[0]]
    if not changed:
        return None
    counts = f"{len(changed)} of {len(known)} sampled videos"
    return f"{counts} have other content now, e.g. {escaped(changed[0])}"


def _identify(path: Path) -> str:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return _UNKNOWN
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_END_BYTES))
            file.seek(max(_END_BYTES, found.st_size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    except (OSError, ValueError):
        return _UNKNOWN
    return f"{found.st_size}-{digest.hexdigest()[:12]}"
