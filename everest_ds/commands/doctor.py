"""`everest doctor`: what this machine has, and what is missing to train on it.

Every part is imported and checked in a child process. A part that fails in any way, even one that crashes or hangs
its process, is a row of the table, and the other parts are checked all the same.
"""

import importlib
import multiprocessing
import os
import platform
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection

from everest_ds import distributed
from everest_ds.commands.parsing import parse
from everest_ds.config.sections import ReaderName
from everest_ds.distributed import World

OK, OPTIONAL, MISSING = "ok", "--", "MISSING"
REQUIRED = ("torch", "torchvision", "timm", "deepspeed", "av", "einops", "tensorboard", "tyro")
TIMEOUT_S = 300.0
"""Seconds that one part may take: the first import of torch and DeepSpeed from a slow disk takes a minute."""

Row = tuple[str, str, str]
"""State, part, finding."""

Check = tuple[str, str, Callable[[], list[Row]]]
"""A part's state where it fails, its name, and what returns its rows."""


@dataclass(frozen=True)
class Arguments:
    """Check this machine."""


def main(words: list[str], world: World) -> int:
    """Print one line for each finding; return 1 when something required is missing, else 0."""
    parse(Arguments, words, "everest doctor", world)
    missing = []
    for state, what, finding in _survey(_checks()):
        print(f"{state:<8} {what:<22} {finding}", flush=True)
        if state == MISSING:
            missing.append(what)
    print(f"\n{'missing: ' + ', '.join(missing) if missing else 'ready to train'}")
    return 1 if missing else 0


def _checks() -> list[Check]:
    readers: tuple[tuple[str, ReaderName], ...] = (
        (MISSING, "pyav"),
        (OPTIONAL, "decord"),
        (OPTIONAL, "torchcodec"),
    )
    return [
        (MISSING, "python", lambda: [(OK, "python", platform.python_version())]),
        *((MISSING, name, partial(_package, name)) for name in REQUIRED),
        (MISSING, "GPU", _devices),
        (MISSING, "attention", _attention),
        *((state, f"reader {name}", partial(_reader, name, state)) for state, name in readers),
        (MISSING, "launcher", _launcher),
    ]


def _survey(checks: list[Check]) -> Iterator[Row]:
    """Yield the rows of all checks; a child process that ends in one of them is replaced for those after it."""
    while checks:
        answered = 0
        for rows in _answers(checks):
            yield from rows
            answered += 1
        checks = checks[answered:]


def _answers(checks: list[Check]) -> Iterator[list[Row]]:
    """Yield the rows of each check from one child process, up to the first check that ends it or hangs."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(checks, sender), daemon=True)
    child.start()
    sender.close()
    try:
        for state, what, _ in checks:
            try:
                if receiver.poll(TIMEOUT_S):
                    yield receiver.recv()
                    continue
                fault = f"does not answer within {TIMEOUT_S:.0f} s"
            except EOFError:
                child.join()
                fault = _ending(child.exitcode or 0)
            yield [(state, what, fault)]
            break
    finally:
        child.kill()
        child.join()


def _run(checks: list[Check], sender: Connection) -> None:
    """Send the rows of each check; what libraries print goes to stderr, away from the table."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(2, 1)
    for state, what, look in checks:
        try:
            rows = look()
        except BaseException as error:  # whatever it is, it is the finding
            rows = [(state, what, _words_of(error))]
        sender.send(rows)


def _ending(exitcode: int) -> str:
    if exitcode < 0:
        return f"crashes its process: {signal.Signals(-exitcode).name}"
    return f"ends its process with exit code {exitcode}"


def _words_of(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _package(name: str) -> list[Row]:
    try:
        found = version(name)
        if name == "deepspeed":
            distributed.select_accelerator()
        importlib.import_module(name)
    except PackageNotFoundError:
        return [(MISSING, name, f"not installed; pip install {name}")]
    except Exception as error:  # a package may fail to import in any way
        return [(MISSING, name, f"{found} does not import: {_words_of(error)}")]
    return [(OK, name, found)]


def _devices() -> list[Row]:
    import torch

    if not torch.cuda.is_available():
        return [(OPTIONAL, "GPU", "none; training runs on the CPU with gloo")]
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((OK, f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    return rows


def _attention() -> list[Row]:
    import torch

    from everest_ds.model.attention import BACKENDS, choose_backend

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    chosen = choose_backend("auto", device, dtype, 64).name
    rows: list[Row] = []
    for backend in BACKENDS.values():
        obstacle = backend.obstacle(device, dtype, 64)
        state = OPTIONAL if obstacle else OK
        role = "auto" if backend.name == chosen else "available"
        rows.append((state, f"attention {backend.name}", obstacle or role))
    return rows


def _reader(name: ReaderName, broken: str) -> list[Row]:
    """Encode a clip, decode it again with the reader, and compare the frames; `broken` is the state otherwise."""
    import tempfile
    from pathlib import Path

    from everest_ds.data.demo import DemoConfig, encode_h264, render_video
    from everest_ds.data.readers.choice import choose_reader, obstacle
    from everest_ds.data.readers.video import Video, VideoReadError

    what = f"reader {name}"
    fault = obstacle(name)
    if fault:
        return [(broken, what, fault)]
    frames = render_video(DemoConfig(num_frames=4), "train", 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.mp4"
        encode_h264(path, frames)
        try:
            decoded = Video(path, reader=name).read([0, 3])
        except VideoReadError as error:
            return [(broken, what, f"decoding H.264: {error.reason}")]
    error_mean = abs(decoded.astype(int) - frames[[0, 3]].astype(int)).mean()
    role = "auto" if name == choose_reader("auto") else "available"
    return [(OK, what, f"{role}; decoding H.264: mean error {error_mean:.1f} of 255")]


def _launcher() -> list[Row]:
    import torch
    import torch.distributed as dist

    found = shutil.which("deepspeed")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    available = dist.is_backend_available(backend)
    return [
        (
            OK if found else OPTIONAL,
            "deepspeed launcher",
            found or "not on PATH; activate the environment, or use torchrun -m everest_ds",
        ),
        (OK if available else MISSING, f"communication {backend}", "available" if available else "not built in"),
    ]
