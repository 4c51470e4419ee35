"""The processes of a launch: ranks, process group, collectives, one message for all. A leaf.

Works under ``deepspeed``, ``torchrun``, Slurm and MPI, or without any (then the launch has one process). torch is
imported when needed.
"""

import datetime
import errno
import hashlib
import os
import socket
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from everest_ds.console import streams
from everest_ds.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# Waits for the end of the launcher, at most a minute. By then it has ended all ranks that might print the same.
_OUTLIVE_US = (
    "import os, select, sys; launcher = select.poll(); launcher.register(os.pidfd_open(int(sys.argv[1]))); "
    "launcher.poll(60_000)"
)

# Launchers check once a second whether a rank has ended.
_RANK_ZERO_SPEAKS_WITHIN_S = 5.0

# Warnings of torch 2.11 and newer at a barrier of NCCL without a device.
_NO_DEVICE = (
    r"barrier\(\): using the device under current context|No device id is provided via `init_process_group`"
)

# On GPUs, files, signals and numbers are exchanged through this gloo group, which never waits for the device.
_host_group: Any = None


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank of this process, and the number of processes, on this machine and in the launch."""

    rank: int
    local_rank: int
    size: int
    local_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and writes."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> "World":
        """Read the launcher's environment variables; one process if there is no launcher."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            size=size,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size),
        )


def speaks_first(message: str, world: World) -> bool:
    """Return whether this process is the first of its launch on this machine to print a message.

    All processes find the same fault at nearly the same time, and the launcher kills the others once one has ended.
    So the first process must print, not rank 0. It binds an abstract socket whose name is a hash of the launcher
    (the parent process and its start) and the message. A small process keeps the socket bound until the launcher
    has ended. No file is left behind.
    """
    if world.size == 1:
        return True
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        started = ""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = hashlib.sha256(f"{parent} {started} {attempt} {message}".encode()).hexdigest()[:24]
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0everest-said-{name}")
        claim.set_inheritable(True)
        os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", _OUTLIVE_US, str(parent)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in range(3)],
            setsid=True,
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            claim.close()
            return False
    claim.detach()  # stays bound until this process ends
    return True


def select_accelerator() -> bool:
    """Let DeepSpeed use the CPU if there is no GPU, and return whether there is one; before DeepSpeed's import."""
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return on_gpu


def start(world: World) -> "torch.device":
    """Join the process group and return this process's device: its GPU if there is one, else the CPU.

    On a CPU, the cores are divided among the machine's processes unless OMP_NUM_THREADS is set.

    Raises:
        UserError: The address or port of the process group is missing or wrong, or joining fails.
    """
    _require_meeting_place(world)
    import torch

    on_gpu = select_accelerator()
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    with streams.quietly():
        import deepspeed
        import deepspeed.ops

    # gloo does not need this operator, and building it takes a compiler and most of a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if on_gpu and world.size == 1:
        # DeepSpeed tells NCCL its device only if there are several processes, because NCCL failed to start on some
        # machines otherwise. For a single process the current device is right, so the warning is not useful.
        warnings.filterwarnings("ignore", _NO_DEVICE, UserWarning)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, str(value))
    if world.size == 1:
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if on_gpu:
        index = device_index(world, torch.cuda.device_count())
        torch.cuda.set_device(index)
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed uses it as the device index, here and in its engine
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # the older name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # recorded collectives, for reports of hangs
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    except torch.distributed.DistError as error:
        if not world.is_main:
            time.sleep(_RANK_ZERO_SPEAKS_WITHIN_S)  # rank 0 knows the cause; the launcher then ends this rank
        raise UserError(_no_meeting(str(error))) from error
    global _host_group
    _host_group = torch.distributed.new_group(backend="gloo") if on_gpu else None
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def device_index(world: World, num_visible: int) -> int:
    """Return the index of a rank's GPU among the visible ones: 0 if the scheduler shows each rank only its own."""
    return 0 if num_visible == 1 else world.local_rank


def _require_meeting_place(world: World) -> None:
    if world.size == 1 and "MASTER_PORT" not in os.environ:
        return
    given = {name: os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")}
    missing = [name for name, value in given.items() if not value and world.size > 1]
    if missing:
        raise UserError(
            f"{world.size} processes were started without {' and '.join(missing)}. Start with deepspeed or "
            "torchrun, or set the host of rank 0 and a free port: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500"
        )
    port = given["MASTER_PORT"]
    if not (port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port} is not a port; set --master_port to a number from 1024 to 65535")


def _no_meeting(fault: str) -> str:
    """Return the message for a process group that could not be formed."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in fault:
        return (
            f"port {port} of {address} is used by another process, perhaps another training; choose a free port, "
            "for example --master_port 29501"
        )
    return (
        f"the processes could not connect at port {port} of {address}: {fault.splitlines()[0]}; try another "
        "--master_port, or set --master_addr to the host of rank 0"
    )


def finish() -> None:
    """Leave the process group. Without this, gloo sometimes aborts at the exit of a process."""
    if dist := _initialized():
        barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()


def set_timeout(seconds: float) -> None:
    """Set the timeout of later collectives in all groups of this process."""
    if dist := _initialized():
        limit = datetime.timedelta(seconds=seconds)
        core = dist.distributed_c10d
        set_one = getattr(dist, "set_timeout", None) or core._set_pg_timeout  # the name before torch 2.14
        for group in list(core._world.pg_map):
            set_one(limit, group)


def barrier() -> None:
    """Wait for all processes, not for their devices."""
    if dist := _initialized():
        dist.barrier(group=_host_group)


def largest(value: int) -> int:
    """Return the maximum of an integer over all processes; cheap enough for every step."""
    import torch

    dist = _initialized()
    if not dist or dist.get_world_size() == 1:
        return value
    shared = torch.tensor([value])
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=_host_group)
    return int(shared)


def rank() -> int:
    """Return this process's rank in the process group; 0 without one."""
    dist = _initialized()
    return dist.get_rank() if dist else 0


def world_size() -> int:
    """Return the number of processes in the process group; 1 without one."""
    dist = _initialized()
    return dist.get_world_size() if dist else 1


def gather_rows(rows: "torch.Tensor") -> "torch.Tensor":
    """Return the rows of all processes, in rank order, on the device, without gradient. All have as many rows."""
    import torch

    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def sum_of(value: "torch.Tensor") -> "torch.Tensor":
    """Return the sum of a tensor over all processes, on the device; the tensor itself is unchanged."""
    if world_size() == 1:
        return value
    total = value.clone()
    _initialized().all_reduce(total)
    return total


def are_same(numbers: "torch.Tensor") -> "torch.Tensor":
    """Return, for each integer, whether it is the same on all processes: bool, on the device, on all processes."""
    import torch

    if world_size() == 1:
        return torch.ones_like(numbers, dtype=torch.bool)
    both = torch.cat([numbers, ~numbers])  # the maximum of the complements is the complement of the minimum
    _initialized().all_reduce(both, op=_initialized().ReduceOp.MAX)
    return both[: len(numbers)] == ~both[len(numbers) :]


def reduce_scatter_single(part: "torch.Tensor", whole: "torch.Tensor", group: Any) -> None:
    """Sum a tensor over the processes of a group, and write this process's part of the sum to ``part``."""
    dist = _initialized()
    newest = getattr(dist, "reduce_scatter_single", None)  # the name since torch 2.13; the older one warns there
    (newest or dist.reduce_scatter_tensor)(part, whole, group=group)


def all_gather_single(whole: "torch.Tensor", part: "torch.Tensor", group: Any) -> None:
    """Gather the parts of all processes of a group, in rank order; ``part`` may be a view of ``whole``."""
    dist = _initialized()
    newest = getattr(dist, "all_gather_single", None)
    (newest or dist.all_gather_into_tensor)(whole, part, group=group)


def gather_objects(value: T) -> list[T]:
    """Return one small object of every process, in rank order."""
    dist = _initialized()
    if not dist:
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=_host_group)
    return everyone


def agree(fault: str | None) -> str | None:
    """Return the first fault of any process, so that all processes stop with it; None if there is none."""
    return next((text for text in gather_objects(fault) if text), None)


def _initialized() -> Any:
    """Return torch.distributed if this process is in a process group, else None."""
    import torch.distributed

    return torch.distributed if torch.distributed.is_initialized() else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
