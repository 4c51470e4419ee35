"""Checks of GPUs, attention backends and launchers."""

import shutil

import torch
import torch.distributed as dist

from everest_ds.commands.doctor import MISSING, OK, OPTIONAL, Row
from everest_ds.model.attention import BACKENDS, choose_backend, dense_kernels


def devices() -> list[Row]:
    """Return a row for each GPU, or a row that says there is none."""
    if not torch.cuda.is_available():
        return [(OPTIONAL, "GPU", "none; training runs on the CPU with gloo")]
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((OK, f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    return rows


def attention() -> list[Row]:
    """Return a row for the backend that auto chooses, and one for each attention backend."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    chosen = choose_backend("auto", device, dtype, 64).name
    kernels = [kernel.name.removesuffix("_ATTENTION").lower() for kernel in dense_kernels(device)]
    tried = f"; sdpa tries {', '.join(kernels)} in this order" if on_gpu else ""
    rows: list[Row] = [(OK, "attention auto", f"takes {chosen}{tried}")]
    for backend in BACKENDS.values():
        obstacle = backend.obstacle(device, dtype, 64)
        state = OPTIONAL if obstacle else OK
        rows.append((state, f"attention {backend.name}", obstacle or "available"))
    return rows


def launcher() -> list[Row]:
    """Return rows for the deepspeed launcher and for the communication backend."""
    found = shutil.which("deepspeed")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    available = dist.is_backend_available(backend)
    where = found or "not on PATH; activate the environment, or use torchrun -m everest_ds"
    return [
        (OK if found else OPTIONAL, "deepspeed launcher", where),
        (OK if available else MISSING, f"communication {backend}", "available" if available else "not built in"),
    ]
