"""Run the programs `scan_*.py`, which measure in separate processes, and collect their figures.

A program calls `report` for every line of figures and ends with `run_scan`. A test calls `scan` and gets the lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from everest_ds import distributed
from tests.conftest import REPOSITORY
from tests.integration.launch import compute

MARK = "SEEN "


def report(**figures: Any) -> None:
    """Send figures to the test in a single write, because several processes share the stream."""
    sys.stdout.write(f"{MARK}{json.dumps(figures)}\n")
    sys.stdout.flush()


def run_scan(program: Callable[[distributed.World, torch.device], None]) -> None:
    """Run a program in the process group of its launch, and end this process at once."""
    world = distributed.World.from_environment()
    device = distributed.start(world)
    program(world, device)
    distributed.finish()
    sys.stdout.flush()
    os._exit(0)


def scan(
    name: str,
    *arguments: object,
    processes: int = 1,
    timeout_s: float = 600,
    folder: Path = REPOSITORY,
    **environment: str,
) -> list[dict[str, Any]]:
    """Run the program scan_NAME.py in forks and return what its processes reported."""
    done = compute(
        [str(argument) for argument in arguments],
        processes=processes,
        module=f"tests.integration.scan_{name}",
        timeout_s=timeout_s,
        folder=folder,
        environment=environment,
    )
    assert done.returncode == 0, done.stderr
    return reported(done.stdout)


def run_in_turn(commands: Sequence[Sequence[str]], folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run several `everest` commands in one process, with ``folder`` as working directory; see `scan_commands`."""
    seen = scan("commands", json.dumps([list(one) for one in commands]), folder=folder)
    return [subprocess.CompletedProcess(one, **found) for one, found in zip(commands, seen, strict=True)]


def reported(stdout: str) -> list[dict[str, Any]]:
    """The figures among what a program printed."""
    return [json.loads(text.splitlines()[0]) for text in stdout.split(MARK)[1:]]
