"""Output of libraries goes to the rank's file. Users see the command's own output, and everything if it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, subprocess, sys, warnings
from everest_ds.console import streams
from everest_ds.errors import UserError
from everest_ds.console.messages import say, send_libraries_to
import logging
from pathlib import Path

path, speaks, ends = Path(sys.argv[1]), sys.argv[2] == "speaks", sys.argv[3]
print("before", flush=True)
with streams.set_aside(speaks=speaks):
    send_libraries_to(sys.__stderr__)
    with streams.quietly():
        handler = logging.StreamHandler(sys.stdout)  # as DeepSpeed binds its own
        print("an import prints")
    child = subprocess.Popen([sys.executable, "-c", "input(); print('a child prints')"], stdin=subprocess.PIPE)
    if ends != "well":
        raise {"early": RuntimeError, "refused": UserError}[ends]("lost")
    assert streams.keep_in(path)
    os.write(1, b"a library in C prints\\n")
    os.write(2, b"and complains\\n")
    warnings.warn("a warning of Python's")
    logging.getLogger("library").warning("unhandled")
    handler.emit(logging.makeLogRecord({"msg": "handled"}))
    say("news")
    say("warning: careful\\x1b")
    os.write(streams.stderr_fd, b"past the buffers\\n")
    print("to stderr", file=sys.stderr)
    child.communicate(b"\\n")
print("after", flush=True)
os.write(2, b"after, too\\n")
"""


def run(tmp_path: Path, speaks: str, ends: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    path = tmp_path / "logs" / "rank-00000.log"
    words = [sys.executable, "-c", PROGRAM, str(path), speaks, ends]
    return subprocess.run(words, capture_output=True, text=True, check=False), path


def test_libraries_write_to_the_log_and_the_command_to_people(tmp_path: Path) -> None:
    for start in (1, 2):
        done, path = run(tmp_path, "speaks", "well")
        assert done.stdout.splitlines() == ["before", "news", r"warning: careful\x1b", "after"]
        assert done.stderr.splitlines() == ["past the buffers", "to stderr", "after, too"]
        log = path.read_text()
        words = ["an import prints", "a library in C prints", "and complains", "UserWarning: a warning of Python's"]
        for word in [*words, "unhandled\n", "handled\n", "a child prints"]:
            assert log.count(word) >= start, (word, log)
        assert log.count("--- process") == start


def test_other_ranks_say_nothing_on_stdout_but_errors(tmp_path: Path) -> None:
    done, path = run(tmp_path, "listens", "well")
    assert done.stdout.splitlines() == ["before", "after"]
    assert "to stderr" in done.stderr
    assert "news" in path.read_text()


def test_failure_before_there_is_a_log_shows_what_libraries_said(tmp_path: Path) -> None:
    done, path = run(tmp_path, "speaks", "early")
    assert not path.exists()
    assert "an import prints" in done.stderr
    assert "RuntimeError: lost" in done.stderr


def test_refusal_stands_alone(tmp_path: Path) -> None:
    done, _ = run(tmp_path, "speaks", "refused")
    assert "an import prints" not in done.stderr
    assert "UserError: lost" in done.stderr


DISPATCH = """
import os, sys
from everest_ds.cli import dispatch
from everest_ds.cli.table import Command

class Printing(Command):
    def load_entry(self):
        return lambda words, world: words
    def load_work(self):
        return lambda job, world: os.write(1, b"a library prints\\n") and 0

dispatch.COMMANDS = {"print": Printing("prints", keeps_logs=True)}
sys.exit(dispatch.main(["print", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("flags", "shown"), [([], ""), (["-q"], ""), (["-v"], "a library prints\n")])
def test_people_who_ask_for_more_see_what_libraries_print(flags: list[str], shown: str) -> None:
    done = subprocess.run([sys.executable, "-c", DISPATCH, *flags], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, shown), done.stderr
