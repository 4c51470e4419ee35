"""RUN/config.json: writes a configuration in full, and reads it strictly.

Unknown keys are refused with the nearest name, missing keys are named, and a value must have its field's type, so
that the file states exactly what a run did. Fields that older versions did not write get their default, with which
old runs compute the same as before.
"""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.errors import UserError, nearest_hint
from everest_ds.files import read_json_object

_ADDED_LATER = frozenset(
    {
        "data.max_pixels",
        "data.sampling_seconds",
        "model.cuda_graph",
        "optim.gradients",
        "run.check_weights_every",
        "run.hang_after_s",
        "run.log_to",
        "run.pictures_every_steps",
        "run.profile",
        "run.save_async",
    }
)
"""Fields that older versions did not store; with their defaults, old runs compute the same as before."""

CONFIGS: dict[str, type[Config]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


def dump_config(config: Config) -> str:
    """Return the configuration as indented JSON, every field written out."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def load_config(path: Path) -> Config:
    """Read a configuration that `dump_config` wrote.

    Raises:
        UserError: The file is missing or not JSON, a key is unknown (the nearest is named) or missing, or the type
            of a value is wrong.
    """
    return config_from_dict(read_json_object(path), source=str(path))


def config_from_dict(raw: Any, *, source: str = "config") -> Config:
    """Build a configuration from nested dictionaries, strictly; see `load_config`."""
    if not isinstance(raw, dict):
        raise UserError(f"{source}: the file must be an object, got {type(raw).__name__}")
    task = raw.get("task")
    if not isinstance(task, str) or task not in CONFIGS:
        raise UserError(f"{source}: task={task!r:.100} must be one of {', '.join(CONFIGS)}")
    return typing.cast(Config, _build(CONFIGS[task], raw, where="", source=source))


def _build(cls: Any, raw: Any, *, where: str, source: str) -> Any:
    if not isinstance(raw, dict):
        raise UserError(f"{source}: {where} must be an object, got {type(raw).__name__}")
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]
    for key in raw:
        if key not in names:
            raise UserError(f"{source}: unknown key {where}{key}{nearest_hint(key, names)}")
    names = [name for name in names if name in raw or f"{where}{name}" not in _ADDED_LATER]
    missing = [name for name in names if name not in raw]
    if missing:
        raise UserError(f"{source}: key {where}{missing[0]} is missing; a stored configuration has every key")
    values = {name: _coerce(hints[name], raw[name], f"{where}{name}", source) for name in names}
    return cls(**values)


def _coerce(hint: Any, value: Any, where: str, source: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where=f"{where}.", source=source)
    if _matches(hint, value):
        if get_origin(hint) is tuple:
            item = get_args(hint)[0]
            return tuple(float(one) if item is float else one for one in value)
        return float(value) if hint is float else value
    expected = str(get_args(hint)) if get_origin(hint) is Literal else getattr(hint, "__name__", str(hint))
    raise UserError(f"{source}: {where}={value!r} is not of type {expected}")


def _matches(hint: Any, value: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if origin in (types.UnionType, typing.Union):
        return any(_matches(option, value) for option in get_args(hint))
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_matches(get_args(hint)[0], item) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
