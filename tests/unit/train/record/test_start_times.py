from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.files import read_json_lines
from everest_ds.processes import seconds_since_start
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.record.start_times import FirstStep, StartTimes
from tests.conftest import REPOSITORY

BATCH: Any = None
RESULT: Any = None


def test_stopwatch_begins_with_the_process() -> None:
    words = "import time; time.sleep(0.5); from everest_ds.processes import seconds_since_start as s; print(s())"
    began = time.perf_counter()
    said = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert 0.5 <= float(said.stdout) <= time.perf_counter() - began + 0.02  # the kernel's clock has steps of 0.01 s


def test_parts_add_up() -> None:
    times = StartTimes()
    times.end("imports")
    time.sleep(0.05)
    times.end("engine")
    assert times.total_s == pytest.approx(seconds_since_start(), abs=0.05)
    assert 0.05 <= times.parts_s["engine"] < times.total_s
    times.end("imports")
    assert list(times.parts_s) == ["imports", "engine"]


def test_first_step_is_recorded_once_and_later_batches_do_not_count(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 7, is_main=True)
    callback = FirstStep(log, StartTimes())
    for step in (8, 9):
        callback.on_batch(BATCH)
        callback.on_batch(BATCH)  # the batch of a second micro-step
        callback.on_step(step, [torch.zeros(())], RESULT)
    log.close()
    (line,) = read_json_lines(tmp_path / "metrics.jsonl")
    assert (line["event"], line["step"], list(line["parts_s"])) == ("first_step", 8, ["first batch", "step"])
    assert line["total_s"] == pytest.approx(sum(line["parts_s"].values()), abs=0.02)
