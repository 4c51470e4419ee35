"""Launch runs as forks of one process that has already imported torch, DeepSpeed and the project.

Starting a process with these imports takes as long as ten steps of a small run, and the deepspeed launcher starts
two more processes. Neither changes what a run computes or refuses, so tests of these use this module. Tests of
launchers, signals and kills use `launch.launch` or `launch.start`, as users do.

Run as a program, this module is the server that forks. It reads one line of JSON a launch and answers with a line
of exit codes.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import everest_ds
from tests.conftest import REPOSITORY
from tests.messages import record_if_asked

# What runs import besides the modules of the project; the compiler, because DeepSpeed decorates functions with
# torch.compile. Of the video libraries only the one without threads: a fork would lose them.
PRELOADED = (
    "av", "deepspeed", "deepspeed.module_inject.auto_ep_layer", "deepspeed.moe.layer", "deepspeed.ops.adam",
    "deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.zero.muon.muon_optimizer", "einops._torch_specific",
    "matplotlib.backends.backend_agg", "matplotlib.figure",
    "tests.integration.scanning", "torch._inductor.compile_fx", "torch.utils.cpp_extension",
    "torch.utils.serialization", "torch.utils.tensorboard", "torchvision.transforms.v2", "tyro.constructors",
    "typeguard",
)  # fmt: skip
# Not imported: programs, and code that is copied to where transformers is installed.
NOT_PRELOADED = ("everest_ds.__main__", "everest_ds.model.weights.hub_code")


def run_forked(
    words: Sequence[str], *, ranks: Sequence[Mapping[str, str]], folder: Path = REPOSITORY, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` to its end in one process per rank, and return the output of all.

    Args:
        words: `-m MODULE ARGUMENTS` or `FILE ARGUMENTS`.
        ranks: Variables that each process's environment has besides the server's.
        folder: Working directory of the processes.
        timeout_s: Everything is killed after this many seconds.

    Raises:
        TimeoutExpired: The processes took longer.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as streams:
        out, err = Path(streams) / "stdout", Path(streams) / "stderr"
        request = {"words": list(words), "ranks": [dict(rank) for rank in ranks], "folder": str(folder)}
        request |= {"out": str(out), "err": str(err)}
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout_s)[0]:
            _end(server)
            _server.cache_clear()
            raise subprocess.TimeoutExpired(list(words), timeout_s, out.read_bytes(), err.read_bytes())
        codes = json.loads(server.stdout.readline())
        failed = [code for code in codes if code]
        # Ignore ranks that were killed because another one had failed.
        worst = next((code for code in failed if code != -signal.SIGKILL), failed[0] if failed else 0)
        return subprocess.CompletedProcess(list(words), worst, out.read_text(), err.read_text())


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """Start the server that forks; it ends with this process."""
    from tests.integration.launch import cpu_environment

    server = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.forking"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=cpu_environment(PYTHONPATH=str(REPOSITORY)),
        cwd=REPOSITORY,
        start_new_session=True,
    )
    atexit.register(_end, server)
    return server


def _end(server: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.communicate()


def serve() -> None:
    """Fork a launcher and its ranks for every request until there are no more. Ranks return from here, too."""
    for module in PRELOADED:
        importlib.import_module(module)
    for module in pkgutil.walk_packages(everest_ds.__path__, "everest_ds."):
        if not module.name.startswith(NOT_PRELOADED):
            importlib.import_module(module.name)
    torch.compile(len)  # builds tables that every compilation needs
    record_if_asked()
    gc.freeze()  # garbage collection in forks skips these objects
    assert len(os.listdir("/proc/self/task")) == 1
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        launcher = os.fork()
        if launcher:
            os.waitpid(launcher, 0)
            continue
        request = json.loads(line)
        running = {}
        for rank, environment in enumerate(request["ranks"]):
            pid = os.fork()
            if not pid:
                become(request, environment)
                return
            running[pid] = rank
        print(json.dumps(wait_for_all(running)), file=answers, flush=True)
        os._exit(0)


def wait_for_all(running: dict[int, int]) -> list[int]:
    """Return the exit code of every rank; if one fails, kill the others as a launcher does."""
    codes = [0] * len(running)
    while running:
        pid, status = os.wait()
        codes[running.pop(pid)] = code = os.waitstatus_to_exitcode(status)
        if code and running:
            time.sleep(0.2)  # a launcher polls once a second: the failed rank has that long to print its message
        for other in running if code else ():
            os.kill(other, signal.SIGKILL)
    return codes


def become(request: dict[str, Any], environment: Mapping[str, str]) -> None:
    """Turn this fork into the requested process: set streams and environment, run the program."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(request[name], flags)
        os.dup2(file, stream)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ |= environment
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(request["folder"])
    words = request["words"]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve()
