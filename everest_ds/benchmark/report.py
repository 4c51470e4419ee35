"""Output of benchmarks: JSON lines or table rows, and a description of the machine."""

import json
import os
import platform
import re
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from everest_ds.benchmark.options import StepOptions
from everest_ds.config import Config
from everest_ds.distributed import World
from everest_ds.train.checkpoints.run_dir import describe_environment

Rows = Callable[[dict[str, Any]], Iterable[str]]
"""Turns the fields of a line into rows of a table."""


class Table:
    """Columns of a printed table: name, width, and format of the values; `<` is for text, aligned left."""

    def __init__(self, *columns: tuple[str, int, str]) -> None:
        self._columns = columns

    @property
    def head(self) -> str:
        return self.row(*(name for name, _, _ in self._columns))

    def row(self, *values: float | str | None) -> str:
        """Return a row. None is printed as a dash; the last columns may have no value."""
        cells = ""
        for value, (_, width, form) in zip(values, self._columns, strict=False):
            text = "-" if value is None else value if isinstance(value, str) else f"{value:{form}}"
            cells += f"{text:{'<' if form == '<' else '>'}{width}}"
        return cells


class StepReport:
    """Prints measurements as they arrive, on rank 0: JSON lines, or rows of a table under a heading.

    All JSON lines have the common fields, `run_fields` among them.
    """

    def __init__(self, world: World, common: dict[str, Any], table: Table, rows: Rows, *, as_json: bool) -> None:
        self._world, self._common, self._rows, self._as_json = world, common, rows, as_json
        if world.is_main and not as_json:
            print(f"{_heading(common)}\n\n{table.head}", flush=True)

    def print(self, line: dict[str, Any], *, from_any_rank: bool = False) -> None:
        if self._world.is_main or from_any_rank:
            text = json.dumps({**self._common, **line}) if self._as_json else "\n".join(self._rows(line))
            print(text, flush=True)


def run_fields(name: str, config: Config, device: torch.device, options: StepOptions) -> dict[str, Any]:
    """Return the fields of every line about steps: recipe, options, device and environment."""
    on_gpu = device.type == "cuda"
    return {
        "benchmark": name,
        "recipe": config.recipe,
        "size": config.model.size,
        "tokens": config.tokens,
        "steps": options.steps,
        "warmup": options.warmup,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {_cpu_model()}",
        "device_memory_gib": round(gpu_memory_gib(device), 2) if on_gpu else None,
        "memory_gib": options.memory_gib,
        "memory_is": "allocated" if on_gpu else "resident",
        "environment": describe_environment(),
    }


def _heading(common: dict[str, Any]) -> str:
    """Return recipe, settings, hardware, versions and commit as text."""
    environment = common["environment"]
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "deepspeed", "timm"))
    known = (
        "gpus", "zero_stage", "precision", "attention", "gradients", "activation_checkpointing",
        "recompute_attention", "compile_blocks", "includes", "time",
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
    """Return command, commit, versions and hardware, including the libraries of the data path and the CPU."""
    found = describe_environment()
    for package in ("torchvision", "av", "torchcodec", "pillow"):
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    return found | {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0))}


def _cpu_model() -> str:
    """Return the processor's name on Linux, elsewhere the architecture."""
    path = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: *(.*)", path.read_text(encoding="utf-8") if path.is_file() else "", re.M)
    return name[1].strip() if name else platform.machine()


def gpu_memory_gib(device: torch.device | int) -> float:
    return torch.cuda.get_device_properties(device).total_memory / 2**30


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Round a field that may be None."""
    return None if value is None else round(value, digits)
