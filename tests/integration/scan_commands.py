"""Several commands in one process that imports torch and DeepSpeed once; run by `scanning.run_in_turn`.

Commands share the state of the process, so this is only for commands that measure or are refused, not for runs.
`--sweep-stages` also measures its stages in this process. Reports a line a command, with its exit code and output.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence

from everest_ds import cli, distributed
from everest_ds.benchmark.steps import sharding_sweep, timing
from everest_ds.cli import dispatch
from everest_ds.model import transformer as compilation
from tests.integration.scanning import report


def run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one command as if it had its own process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(words, code, stdout.getvalue(), stderr.getvalue())


def stay(code: int, *, at_once: bool = False) -> int:
    """Return an exit code to the caller instead of ending the process."""
    return code


def main(commands: Sequence[Sequence[str]]) -> None:
    """Run the commands one after another, in one process group."""
    finish = distributed.finish
    distributed.finish = lambda: None  # DeepSpeed cannot begin a second group in the same process
    dispatch._leave = stay
    sharding_sweep._run = lambda command, gpus: run(command[command.index("everest_ds") + 1 :])
    timing.PROFILED_STEPS = 1  # reading a profile takes a second a step
    compilation.COMPILE_BACKEND = "aot_eager"  # other tests compile with inductor
    seen = [run(words) for words in commands]
    for done in seen:
        report(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)
    finish()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
