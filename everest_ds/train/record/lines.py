"""Records of a run, one JSON object a line: a line that is none is set aside and never ends a run.

metrics.jsonl       a line has `kind` and `step`; see `train.record.metrics`
metrics.jsonl.odd   lines of metrics.jsonl that are not, as they were found
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
    """Return whether an object says of which step it is."""
    return isinstance(line.get("step"), int) and not isinstance(line["step"], bool)


def read_measurements(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, odd ones left out; none where there is no such file."""
    return [line for _, line in sort_json_lines(run_dir / METRICS, is_measurement)[0]]


def keep_lines(
    path: Path, is_record: Callable[[dict[str, Any]], bool], is_kept: Callable[[int, dict[str, Any]], bool]
) -> None:
    """Rewrite a record with some of its lines; odd ones go to PATH.odd and are reported. Nothing without a file.

    Args:
        path: The record.
        is_record: Says whether an object is what the record should hold.
        is_kept: Says, by the number among such lines and the object, whether a line stays.
    """
    if path.is_dir():
        say(f"warning: {path} is a folder, now {move_aside(path, f'odd-{path.name}').name}")
    if not path.is_file():
        return
    lines, odd = sort_json_lines(path, is_record)
    if odd:
        aside = path.with_name(f"{path.name}.odd")
        earlier = aside.read_bytes() if aside.is_file() else b""
        if not earlier.endswith(b"".join(odd)):  # a start that was killed between the two files
            write_atomically(aside, earlier + b"".join(odd))
        shown = escaped(odd[0][:_SHOWN_BYTES].decode("utf-8", "backslashreplace").rstrip("\n"))
        count = "a line" if len(odd) == 1 else f"{len(odd)} lines"
        say(f"warning: {path} holds {count} that it cannot hold, now in {aside.name}: {shown}")
    write_atomically(path, b"".join(text for number, (text, line) in enumerate(lines) if is_kept(number, line)))
