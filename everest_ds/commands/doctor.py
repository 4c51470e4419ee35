"""`everest doctor`: lists what training needs, and what of it is missing on this machine.

Every part is imported and checked in a child process. A part that fails, crashes or hangs becomes a row of the
table, and the other parts are still checked.
"""

import importlib
import multiprocessing
import os
import platform
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

from everest_ds import distributed
from everest_ds.commands.parsing import parse
from everest_ds.distributed import World

OK, OPTIONAL, MISSING = "ok", "--", "MISSING"
REQUIRED = ("torch", "torchvision", "timm", "deepspeed", "av", "einops", "tensorboard", "tqdm", "tyro")
TIMEOUT_S = 300.0
"""Time limit of one part in seconds. The first import of torch and DeepSpeed from a slow disk takes a minute."""

Row = tuple[str, str, str]
"""State, part and finding."""

Check = tuple[str, str, Callable[[], list[Row]]]
"""State of a part if it fails, its name, and a function that returns its rows."""


@dataclass(frozen=True)
class Arguments:
    """Check this machine."""


def main(words: list[str], world: World) -> int:
    """Print one line for each finding; return 1 if something required is missing, else 0."""
    parse(Arguments, words, "everest doctor", world)
    missing = []
    for state, what, finding in _survey(_checks()):
        print(f"{state:<8} {what:<22} {finding}", flush=True)
        if state == MISSING:
            missing.append(what)
    print(f"\n{'missing: ' + ', '.join(missing) if missing else 'ready to train'}")
    return 1 if missing else 0


def _checks() -> list[Check]:
    readers = ((MISSING, "pyav"), (OPTIONAL, "decord"), (OPTIONAL, "torchcodec"))
    return [
        (MISSING, "python", lambda: [(OK, "python", platform.python_version())]),
        *((MISSING, name, partial(_package, name)) for name in REQUIRED),
        (MISSING, "GPU", partial(_call, "machine", "devices")),
        (MISSING, "attention", partial(_call, "machine", "attention")),
        *((state, f"reader {name}", partial(_call, "readers", "reader", name, state)) for state, name in readers),
        (MISSING, "launcher", partial(_call, "machine", "launcher")),
    ]


def _survey(checks: list[Check]) -> Iterator[Row]:
    """Yield the rows of all checks. If a check ends its child process, a new one does the remaining checks."""
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
                code = child.exitcode or 0
                crash = f"crashes its process: {signal.Signals(-code).name}" if code < 0 else None
                fault = crash or f"ends its process with exit code {code}"
            yield [(state, what, fault)]
            break
    finally:
        child.kill()
        child.join()


def _run(checks: list[Check], sender: Connection) -> None:
    """Send the rows of each check. Output of libraries goes to stderr, not into the table."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(2, 1)
    for state, what, look in checks:
        try:
            rows = look()
        except BaseException as error:  # any error is a finding
            rows = [(state, what, _words_of(error))]
        sender.send(rows)


def _words_of(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _call(module: str, function: str, *arguments: str) -> Any:
    """Import a module of checks in this process, and call one of its functions."""
    return getattr(importlib.import_module(f"everest_ds.commands.checks.{module}"), function)(*arguments)


def _package(name: str) -> list[Row]:
    try:
        found = version(name)
        if name == "deepspeed":
            distributed.select_accelerator()
        importlib.import_module(name)
    except PackageNotFoundError:
        return [(MISSING, name, f"not installed; pip install {name}")]
    except Exception as error:  # the import of a package may raise anything
        return [(MISSING, name, f"{found} does not import: {_words_of(error)}")]
    return [(OK, name, found)]
