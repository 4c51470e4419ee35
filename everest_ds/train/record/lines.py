"""Records of a run, one JSON object per line. A malformed line is moved to another file and never ends a run.

metrics.jsonl       each line has `kind` and `step`; see `train.record.metrics`
metrics.jsonl.odd   malformed lines of metrics.jsonl, unchanged
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from everest_ds.console.messages import say
from everest_ds.errors import escaped
from everest_ds.files import move_aside, sort_json_lines, write_atomically

METRICS = "metrics.jsonl"
_SHOWN_BYTES = 60


def is_measurement(line: dict[str, Any]) -> bool:
    """Return whether an object can be a line of metrics.jsonl."""
    return isinstance(line.get("kind"), str) and has_step(line)


def has_step(line: dict[str, Any]) -> bool:
    """Return whether an object has a valid step."""
    return isinstance(line.get("step"), int) and not isinstance(line["step"], bool)


def read_measurements(run_dir: Path) -> list[dict[str, Any]]:
    """Return the valid lines of a run's metrics.jsonl; none if there is no such file."""
    return [line for _, line in sort_json_lines(run_dir / METRICS, is_measurement)[0]]


def keep_lines(
    path: Path, is_record: Callable[[dict[str, Any]], bool], is_kept: Callable[[int, dict[str, Any]], bool]
) -> None:
    """Rewrite a record with some of its lines; malformed ones are moved to PATH.odd and reported.

    Args:
        path: The record; nothing is done if it does not exist.
        is_record: Returns whether an object is a valid line of the record.
        is_kept: Takes the number of a valid line and its object, returns whether to keep it.
    """
    if path.is_dir():
        say(f"warning: {path} is a folder, now {move_aside(path, f'odd-{path.name}').name}")
    if not path.is_file():
        return
    lines, odd = sort_json_lines(path, is_record)
    if odd:
        aside = path.with_name(f"{path.name}.odd")
        earlier = aside.read_bytes() if aside.is_file() else b""
        if not earlier.endswith(b"".join(odd)):  # unless a launch was killed between writing the two files
            write_atomically(aside, earlier + b"".join(odd))
        shown = escaped(odd[0][:_SHOWN_BYTES].decode("utf-8", "backslashreplace").rstrip("\n"))
        count = "a line" if len(odd) == 1 else f"{len(odd)} lines"
        say(f"warning: {path} has {count} of another format, now in {aside.name}: {shown}")
    write_atomically(path, b"".join(text for number, (text, line) in enumerate(lines) if is_kept(number, line)))
