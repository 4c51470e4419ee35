"""Messages to users are short: those in the code, with typical values, and those recorded in a test run."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.messages import VARIABLE, count_sentences, is_too_long, normalise, write_report

# Messages that may be longer, by a part of their text.
LONGER = ("is not in timm's notation",)
# Typical lengths of values in messages.
_PATH, _VALUE = "runs/demo/a.csv", "12345"


def texts_in(path: Path) -> list[str]:
    """Return the messages that a module gives to `UserError`, with typical values."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args]
    return [fill(call.args[0]) for call in calls if ast.unparse(call.func) == "UserError"]


def fill(node: ast.expr) -> str:
    match node:
        case ast.Constant(value):
            return str(value)
        case ast.JoinedStr(values):
            return "".join(map(fill, values))
        case ast.IfExp():
            return max(fill(node.body), fill(node.orelse), key=len)
        case ast.FormattedValue(value):
            return _PATH if re.search("path|folder|file|source|out|root|name", ast.unparse(value)) else _VALUE
    return _PATH


@pytest.mark.parametrize("path", sorted((REPOSITORY / "everest_ds").rglob("*.py")), ids=lambda path: path.stem)
def test_messages_in_the_code_are_short(path: Path) -> None:
    assert [text for text in texts_in(path) if is_too_long(text) and not any(part in text for part in LONGER)] == []


def test_length_counts_characters_and_sentences() -> None:
    assert not is_too_long("x" * 200)
    assert is_too_long("x" * 201)
    assert not is_too_long("It has no label. Use e.g. Y, or start (mpirun ...) `everest`.")
    assert is_too_long("It has no label. Add one. Or remove it.")
    assert count_sentences("data.num_frames=1.5 is not whole; use 2") == 1
    assert normalise("/tmp/run-7/my.csv, line 12: 1.5e-3 s") == "/data/my.csv, line N: N s"


def test_recorded_texts_are_written_once_and_long_ones_returned(tmp_path: Path) -> None:
    """Texts of a process and of its fork; texts that the tests themselves raise are skipped."""
    program = (
        "import contextlib, os; from tests.messages import record_if_asked; record_if_asked()\n"
        "from everest_ds.config.sections import require; from everest_ds.errors import UserError\n"
        "for value, expected in ((1, 'at least 2'), (3, 'at least 2'), (os.fork(), 'long ' * 50)):\n"
        "    with contextlib.suppress(UserError): require(False, 'run.seed', value, expected)\n"
        "UserError('our own')\n"
    )
    environment = os.environ | {VARIABLE: str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=REPOSITORY)
    too_long = write_report(tmp_path, tmp_path / "texts.txt")
    expected = ["run.seed=N must be " + "long " * 50, "run.seed=N must be at least N"]
    assert too_long == expected[:1]
    written = (tmp_path / "texts.txt").read_text().splitlines()
    assert [line.partition("  [")[0].strip() for line in written] == [
        f"{len(text)}  {text}".strip() for text in expected
    ]
