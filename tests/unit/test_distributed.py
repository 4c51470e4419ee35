from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from everest_ds.distributed import World, agree, device_index, gather_objects, speaks_first

PAIR = World(rank=0, local_rank=0, size=2, local_size=2)

ASK = """
import subprocess, sys
child = "from everest_ds.distributed import World, speaks_first; import sys; " \\
        "print(speaks_first(sys.argv[1], World(rank=1, local_rank=1, size=3, local_size=3)))"
children = [subprocess.Popen([sys.executable, "-c", child, sys.argv[1]], stdout=subprocess.PIPE, text=True)
            for _ in range(3)]
print(" ".join(sorted(c.communicate()[0].strip() for c in children)))
"""


def test_world_is_read_from_the_launchers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World(rank=0, local_rank=0, size=1, local_size=1)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert World.from_environment() == World(rank=9, local_rank=1, size=16, local_size=16)
    monkeypatch.setenv("LOCAL_SIZE", "8")
    assert World.from_environment().local_size == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert World.from_environment().local_size == 4
    assert not World.from_environment().is_main


def test_of_all_processes_of_a_launch_exactly_one_speaks_and_each_launch_anew() -> None:
    message = uuid.uuid4().hex
    for _ in range(2):  # two launchers print the same message
        done = subprocess.run([sys.executable, "-c", ASK, message], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False", "False", "True"]


def keepers_of(launcher: int) -> list[bytes]:
    """Return the command lines of processes that mark a launcher's messages as printed."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes())
    return [line for line in lines if b"pidfd_open" in line and line.endswith(f"\0{launcher}\0".encode())]


def test_nothing_of_a_launch_that_was_refused_stays_behind(tmp_path: Path) -> None:
    ranks = "for RANK in 0 1; do RANK=$RANK LOCAL_RANK=$RANK $PYTHON -m everest_ds pretrain no-recipe & done; wait"
    given = {"TMPDIR": str(tmp_path), "WORLD_SIZE": "2", "PYTHON": sys.executable}
    launcher = subprocess.Popen(["bash", "-c", ranks], env=os.environ | given, stderr=subprocess.PIPE, text=True)
    assert launcher.communicate()[1].count("unknown recipe 'no-recipe'") == 1
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 30
    while keepers_of(launcher.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_other_messages_are_said_too_and_a_single_process_always_speaks() -> None:
    first, second = uuid.uuid4().hex, uuid.uuid4().hex
    assert [speaks_first(text, PAIR) for text in (first, second, first)] == [True, True, False]
    alone = World(rank=0, local_rank=0, size=1, local_size=1)
    assert [speaks_first(first, alone) for _ in range(2)] == [True, True]


def test_rank_takes_its_own_gpu_and_the_only_one_that_it_sees() -> None:
    second = World(rank=5, local_rank=1, size=8, local_size=4)
    assert [device_index(second, num_visible) for num_visible in (1, 2, 4)] == [0, 1, 1]


def test_without_a_process_group_reductions_are_the_identity() -> None:
    assert gather_objects("x") == ["x"]
    assert agree("fault") == "fault"
    assert agree(None) is None


ON_GPU = """
import os, warnings
import torch
from everest_ds import distributed

os.environ |= {"DS_ACCELERATOR": "cuda", "WORLD_SIZE": SIZE, "RANK": "1", "LOCAL_RANK": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
torch.cuda.is_available = lambda: True
torch.cuda.set_device = lambda device: print("current", device)
torch.cuda.device_count, torch.cuda.current_device = lambda: VISIBLE, lambda: 1 if VISIBLE > 1 else 0
join = torch.distributed.init_process_group


def init_process_group(backend, device_id=None, **options):
    print(backend, device_id)
    join("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


torch.distributed.init_process_group = init_process_group
print(distributed.start(distributed.World(rank=1, local_rank=1, size=int(SIZE), local_size=int(SIZE))))
print(torch.distributed.get_backend(distributed._host_group))
warnings.warn("barrier(): using the device under current context. You can", stacklevel=2)
"""


@pytest.mark.parametrize(
    ("size", "visible", "device", "warned"), [(2, 2, "cuda:1", True), (2, 1, "cuda:0", True), (1, 2, "None", False)]
)
def test_nccl_is_given_its_device_and_one_process_is_not_warned_that_it_has_none(
    size: int, visible: int, device: str, warned: bool
) -> None:
    """Uses a fake GPU: arguments for NCCL are recorded, and gloo is started instead."""
    program = f"SIZE, VISIBLE = '{size}', {visible}\n{ON_GPU}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    own = min(1, visible - 1)
    assert done.stdout.splitlines() == [f"current {own}", f"nccl {device}", f"cuda:{own}", "gloo"], done.stderr
    assert ("using the device" in done.stderr) == warned
