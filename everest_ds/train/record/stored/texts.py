"""Format values from JSON files as readable text."""

import time
from collections.abc import Mapping
from typing import Any

_DEEPEST = 6


def flat_texts(values: Mapping[str, Any], *, depth: int = 0) -> dict[str, str]:
    """Flatten nested objects to texts by dotted name."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value and depth < _DEEPEST:
            flat |= {f"{name}.{key}": text for key, text in flat_texts(value, depth=depth + 1).items()}
        else:
            flat[name] = text_of(value)
    return flat


def text_of(value: Any, *, depth: int = 0) -> str:
    """Return a JSON value as text: strings without quotes, null and empty containers as none."""
    if value is None or value is True or value is False:
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, list | dict) and depth >= _DEEPEST:
        return "…"
    if isinstance(value, list):
        return ", ".join(text_of(item, depth=depth + 1) for item in value) if value else "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {text_of(item, depth=depth + 1)}" for name, item in value.items()) or "none"
    return str(value)


def number_of(value: Any) -> float:
    """Return a finite number; NaN for anything else."""
    if type(value) is not float and type(value) is not int:
        return float("nan")
    try:
        number = float(value)
    except OverflowError:
        return float("nan")
    return number if abs(number) < 1e300 else float("nan")


def moment_of(value: Any) -> str:
    """Format seconds since 1970 as local time; an empty text for any other value."""
    number = number_of(value)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(number)) if 0 <= number < 2**33 else ""
