"""Five million rows, read in a process as by a run: its CPU time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

NUM_ROWS = 5_000_000
MOST_CPU_S = 20.0  # measured on a loaded AMD EPYC: 6.2 without windows, 14.8 with them
MOST_MIB = 1024  # measured: 231 without windows, 489 with them

READ = """
import dataclasses, json, resource, sys
from everest_ds.data.lists.run_lists import read_lists
from everest_ds.data.lists.video_list import fingerprint
from everest_ds.recipes import get_recipe
config = get_recipe("demo")
lists = read_lists(dataclasses.replace(config, data=dataclasses.replace(config.data, train_list=sys.argv[1])))
print(json.dumps([fingerprint(lists.train), lists.train[len(lists.train) // 2].name, lists.note]))
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 8])
def test_five_million_rows_start_in_seconds(window: int | None, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "00000000.mp4").touch()
    with (tmp_path / "list.csv").open("w") as file:
        for number in range(NUM_ROWS):
            times = "" if window is None else f",{number % 30000 / 100},{number % 30000 / 100 + window}"
            file.write(f"{tmp_path}/videos/{number:08d}.mp4,{number % 400}{times}\n")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "list.csv")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    (digest, middle, note), (cpu_s, mib) = (json.loads(line) for line in done.stdout.splitlines())
    assert digest.startswith(f"{NUM_ROWS} videos, ")
    assert Path(middle.split(" [")[0]).name == f"{NUM_ROWS // 2:08d}.mp4"
    assert note is None
    assert cpu_s < MOST_CPU_S
    assert mib < MOST_MIB
