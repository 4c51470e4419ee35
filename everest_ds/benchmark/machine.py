"""Where a benchmark ran: what its figures mean nothing without."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from everest_ds.train.checkpoints.run_dir import describe_environment

_DATA_PACKAGES = ("torchvision", "av", "torchcodec", "pillow")


def describe_machine() -> dict[str, Any]:
    """Return command, commit, versions and hardware, with the libraries that data passes through and the CPU."""
    found = describe_environment()
    for package in _DATA_PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    return found | {"cpu": cpu_model(), "cores": num_cores()}


def num_cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    """Return the processor's name as Linux gives it; elsewhere the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
