"""The table of commands: parser and function of each fit together, and wrong arguments are refused early."""

from __future__ import annotations

import json
import subprocess
import sys
import typing

import pytest

from everest_ds.cli.table import COMMANDS, Command
from everest_ds.distributed import World

# All commands, with the parts of those that have parts.
ALL = {name: command for name, command in COMMANDS.items() if not command.parts} | {
    f"{name} {part}": command for name, parent in COMMANDS.items() for part, command in parent.parts.items()
}

# Arguments that a command refuses before it imports torch.
REFUSED = {
    "doctor": "doctor --no-such-flag",
    "demo-data": "demo-data /tmp/x --num-frames 0",
    "index": "index ucf101 /no/such/folder --out /no/such/out",
    "check-data": "check-data /no/such/list.csv",
    "prepare": "prepare /no/such/list.csv --out /no/such/out",
    "recipes": "recipes k400_vit_x",
    "plan": "plan k400_vit_l --gpus 7 --gpu-memory-gib 80",
    "pretrain": "pretrain demo --data.train-list /no/such/list.csv",
    "finetune": "finetune demo_ft --data.train-list /no/such/list.csv",
    "evaluate": "evaluate /no/such/run",
    "predict": "predict /no/such/run /no/such/video.mp4",
    "show": "show /no/such/run /no/such/video.mp4 --out /tmp/x",
    "report": "report /no/such/run",
    "convert": "convert a.pth b --to everest --recipe demo",
    "study": "study /no/such/folder --only no-such-condition",
    "benchmark flops": "benchmark flops --no-such-flag",
    "benchmark data": "benchmark data demo --lists /no/such/list.csv",
    "benchmark step": "benchmark step demo --micro-batch 0",
}

RUN = """
import contextlib, io, json, sys
from everest_ds.cli import main
for line in json.loads(sys.argv[1]):
    before, said = set(sys.modules), io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = main(line.split())
        except SystemExit as stop:
            code = stop.code
    heavy = {"torch", "torchvision", "timm", "deepspeed"} & (sys.modules.keys() - before)
    print(json.dumps([code, sorted(heavy), said.getvalue()]))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, tuple[int, list[str], str]]:
    """Exit code of each refusal, the heavy libraries that it was the first to import, and its output."""
    words = [sys.executable, "-c", RUN, json.dumps(list(REFUSED.values()))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return dict(zip(REFUSED, map(json.loads, done.stdout.splitlines()), strict=True))


def test_every_command_has_a_refusal_to_test() -> None:
    assert REFUSED.keys() == ALL.keys()


@pytest.mark.parametrize("name", ALL)
def test_command_refuses_without_torch(name: str, seen: dict[str, tuple[int, list[str], str]]) -> None:
    code, heavy, said = seen[name]
    assert (code, heavy) == (2, []), said


@pytest.mark.parametrize("command", ALL.values(), ids=ALL)
def test_what_an_entry_returns_is_what_the_work_takes(command: Command) -> None:
    entry = typing.get_type_hints(command.load_entry())
    returned = entry.pop("return")
    assert list(entry.values()) == [list[str], World]
    jobs = set(typing.get_args(returned) or [returned]) - {int}
    assert len(jobs) == (command.work is not None)
    if command.work is not None:
        work = typing.get_type_hints(command.load_work())
        assert work.pop("return") is int
        assert list(work.values()) == [*jobs, World]
