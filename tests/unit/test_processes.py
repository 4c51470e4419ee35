from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY

# A module with a pool of forks, like DeepSpeed's converter; one fork hangs in C with Python's lock held.
POOL = """
import ctypes, multiprocessing, os, time
def stay(number):
    print(os.getpid(), flush=True)
    ctypes.PyDLL(None).sleep(300) if number else time.sleep(300)
if __name__ == "__main__":
    print(os.getpid(), flush=True)
    multiprocessing.get_context("fork").Pool(2).map(stay, range(2), chunksize=1)
"""
ABOVE = """
import os, subprocess, sys
environment = os.environ | {"PYTHONPATH": f"{os.getcwd()}:{sys.argv[1]}"}
subprocess.run([sys.executable, "-m", "everest_ds.processes", "pool"], env=environment)
"""


def test_module_and_its_forks_end_with_the_process_above(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    command = [sys.executable, "-c", ABOVE, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as above:
        assert above.stdout is not None
        members = [psutil.Process(int(above.stdout.readline())) for _ in range(3)]
        above.kill()
        above.wait()
        until = time.monotonic() + 5
        while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in members):
            assert time.monotonic() < until
            time.sleep(0.05)
