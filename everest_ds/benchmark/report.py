"""How benchmarks print: one JSON line for programs, or table rows for people; and the machine that was measured."""

import json
import os
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from everest_ds.config import Config
from everest_ds.distributed import World
from everest_ds.train.checkpoints.run_dir import describe_environment

_DATA_PACKAGES = ("torchvision", "av", "torchcodec", "pillow")


class Table:
    """Columns of a printed table.

    Args:
        columns: Name, width, and format of the values of each; `<` is text that is aligned left.
    """

    def __init__(self, *columns: tuple[str, int, str]) -> None:
        self._columns = columns

    @property
    def head(self) -> str:
        """The columns' names."""
        return self.row(*(name for name, _, _ in self._columns))

    def row(self, *values: float | str | None) -> str:
        """Return a row; None shows as a dash, and columns without a value are left out at the end."""
        return "".join(_cell(value, *column[1:]) for value, column in zip(values, self._columns, strict=False))


def _cell(value: float | str | None, width: int, form: str) -> str:
    if form == "<":
        return f"{value:<{width}}"
    text = "-" if value is None else value if isinstance(value, str) else f"{value:{form}}"
    return text.rjust(width)


class StepReport:
    """Prints measured steps as they come, from rank zero.

    Args:
        world: Rank and size.
        common: Fields that all lines share, as `run_fields` returns them and more.
        table: Of the rows.
        rows: Turns a line into rows of the table.
        as_json: One JSON object a line instead of the table.
    """

    def __init__(
        self,
        world: World,
        common: dict[str, Any],
        table: Table,
        rows: Callable[[dict[str, Any]], Iterable[str]],
        *,
        as_json: bool,
    ) -> None:
        self._world, self._common, self._rows, self._as_json = world, common, rows, as_json
        if world.is_main and not as_json:
            print(f"{_heading(common)}\n\n{table.head}", flush=True)

    def print(self, line: dict[str, Any], *, from_any_rank: bool = False) -> None:
        """Print a line."""
        if self._world.is_main or from_any_rank:
            print(
                json.dumps({**self._common, **line}) if self._as_json else "\n".join(self._rows(line)), flush=True
            )


def run_fields(
    name: str, config: Config, device: torch.device, *, steps: int, warmup: int, memory_gib: float | None
) -> dict[str, Any]:
    """Return what is measured and where, as fields of every line about steps."""
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else None
    return {
        "benchmark": name,
        "recipe": config.recipe,
        "size": config.model.size,
        "tokens": config.tokens,
        "steps": steps,
        "warmup": warmup,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {_cpu_model()}",
        "device_memory_gib": None if memory is None else round(memory, 2),
        "memory_gib": memory_gib,
        "memory_is": "allocated" if on_gpu else "resident",
        "environment": describe_environment(),
    }


def _heading(common: dict[str, Any]) -> str:
    """Return recipe, settings, hardware, versions and commit, for people."""
    environment = common["environment"]
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "deepspeed", "timm"))
    known = (
        "gpus", "zero_stage", "precision", "attention", "activation_checkpointing", "recompute_attention",
        "compile_blocks", "includes", "time",
    )  # fmt: skip
    settings = ", ".join(f"{name} {common[name]}" for name in known if name in common)
    ceiling = common.get("ceiling_tflops")
    return (
        f"{common['recipe']}: ViT-{common['size']}, {common['tokens']}\n"
        f"{settings}; {common['steps']} steps after {common['warmup']}\n"
        f"{common['device']}{'' if ceiling is None else f', {ceiling:.0f} TFLOP/s in bf16 matmuls'}; {versions}; "
        f"commit {environment['commit']}"
    )


def data_environment() -> dict[str, Any]:
    """Return command, commit, versions and hardware, with the libraries that data passes through and the CPU."""
    found = describe_environment()
    for package in _DATA_PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    return found | {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0))}


def _cpu_model() -> str:
    """Return the processor's name as Linux gives it; elsewhere the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Round a field of a line that may be null."""
    return None if value is None else round(value, digits)
