"""Compiled blocks: torch.compile of what stands on either side of attention in a block.

Place in the flow: a `Block` that is asked to compile runs its two halves through `compiled`; attention between
them stays a kernel's call, because the lengths of the clips in a packed row must not be compiled in. Code is made
for a width, a dtype, gradients or none, and branch scales or none; all blocks of a stack share it. How many tokens
there are is left open, but for torch's own cases: a single token, and whether attention's output is a view. SDPA's
is where all clips are equally long, and then how many clips there are may make another case.

Not measured on a GPU yet, so it is off unless asked for.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# Tests put another here where there is no compiler.
COMPILE_BACKEND: str | Callable[..., Any] = "inductor"


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function compiled for any number of tokens; always the same one, so that it is compiled once."""
    return _compile(function, COMPILE_BACKEND)


@functools.lru_cache(maxsize=16)
def _compile(function: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend=backend, dynamic=True)


def compile_obstacle(device_type: str) -> str | None:
    """Return why this machine cannot compile for a device, cpu or cuda, or None.

    What torch.compile writes, C++ for a CPU and Triton for a GPU, is compiled here, against Python's headers.
    """
    if COMPILE_BACKEND != "inductor":
        return None
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "it needs the triton package on a GPU; pip install triton"
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        compilers = [os.environ.get("CXX", "g++")]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"it needs a compiler, and there is no {' or '.join(compilers)} on this machine"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return (
        None if headers.is_file() else f"it needs Python's headers, and there is no {headers}; install python3-dev"
    )
