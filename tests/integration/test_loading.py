"""Complete runs with failing loaders: killed processes, videos that hang, paths that are not files."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.integration.launch import SMALL, compute, flags, losses, start

STEPS = 12  # three epochs of 128 videos at 32 a step

# A decord whose readers sleep on a video of that name, in every process that imports it instead of the real one.
SLEEPING_DECORD = """
import importlib, os, sys, time

here = os.path.dirname(__file__)
sys.path.remove(here)
del sys.modules["decord"]
real = importlib.import_module("decord")
sys.path.insert(0, here)

class SleepingReader(real.VideoReader):
    def __init__(self, path, *args, **named):
        if "hang" in str(path):
            time.sleep(600)
        super().__init__(path, *args, **named)

real.VideoReader = SleepingReader
"""


def list_with(demo_folder: Path, path: Path, *videos: Path) -> Path:
    """The demo's training list with other videos in some rows."""
    rows = [f"{demo_folder}/{row}" for row in (demo_folder / "train.csv").read_text().splitlines()]
    for row, video in zip((7, 23), videos, strict=False):
        rows[row] = f"{video} 7"
    path.write_text("\n".join(rows) + "\n")
    return path


def run_words(demo_folder: Path, out: Path, source: Path, workers: int) -> list[str]:
    words = ["--data.train-list", str(source), "--data.num-workers", str(workers), "--data.max-bad-share", "0.1"]
    return flags(demo_folder, out, *SMALL, *words, steps=STEPS)


def bad_samples(run_dir: Path) -> list[tuple[int, int, str]]:
    """Epoch, row and reason of every bad sample that was recorded."""
    lines = map(json.loads, (run_dir / "bad_samples.jsonl").read_text().splitlines())
    return [(line["epoch"], line["index"], line["reason"]) for line in lines]


@pytest.fixture(scope="module")
def reference(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without loader processes, two of whose listed files are missing."""
    folder = tmp_path_factory.mktemp("missing")
    source = list_with(demo_folder, folder / "list.csv", folder / "gone.mp4", folder / "gone too.mp4")
    done = compute(run_words(demo_folder, folder / "run", source, 0))
    assert done.returncode == 0, done.stderr
    found = bad_samples(folder / "run")
    assert {(row, reason) for _, row, reason in found} == {(7, "no such file"), (23, "no such file")}
    assert {epoch for epoch, _, _ in found} == {0, 1, 2}
    return folder / "run"


def loader_processes(pid: int) -> list[int]:
    """The processes that the fork server of a training process has started."""

    def children(parent: int) -> list[int]:
        tasks = Path(f"/proc/{parent}/task")
        return [int(word) for task in tasks.iterdir() for word in (task / "children").read_text().split()]

    servers = [child for child in children(pid) if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return [child for server in servers for child in children(server)]


def test_pipe_and_video_that_hangs_its_decoder_are_bad_samples_and_no_more(
    demo_folder: Path, reference: Path, tmp_path: Path
) -> None:
    pytest.importorskip("decord")
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "decord.py").write_text(SLEEPING_DECORD)
    environment = {"PYTHONPATH": f"{tmp_path / 'stub'}{os.pathsep}{REPOSITORY}"}
    (tmp_path / "hang.mp4").write_bytes((demo_folder / "train" / "00007.mp4").read_bytes())
    os.mkfifo(tmp_path / "pipe.mp4")
    source = list_with(demo_folder, tmp_path / "list.csv", tmp_path / "hang.mp4", tmp_path / "pipe.mp4")
    words = run_words(demo_folder, tmp_path / "run", source, 2)
    began = time.monotonic()
    done = compute([*words, "--data.timeout-s", "4", "--data.reader", "decord"], environment=environment)
    assert time.monotonic() - began < 120
    assert done.returncode == 0, done.stderr
    pipe = "it is a device, a pipe or a socket; only video files are read"
    reasons = {7: "no answer within 4 s", 23: pipe}
    assert bad_samples(tmp_path / "run") == [(epoch, row, reasons[row]) for epoch, row, _ in bad_samples(reference)]
    assert losses(tmp_path / "run") == losses(reference)


def test_loader_processes_killed_in_mid_run_change_nothing(
    demo_folder: Path, reference: Path, tmp_path: Path
) -> None:
    source = list_with(demo_folder, tmp_path / "list.csv", tmp_path / "gone.mp4", tmp_path / "gone too.mp4")
    killed: set[int] = set()
    record = tmp_path / "run" / "metrics.jsonl"
    with start(run_words(demo_folder, tmp_path / "run", source, 2)) as process:
        while process.poll() is None and len(killed) < 3:
            if record.is_file() and len(losses(tmp_path / "run")) >= 1 + 3 * len(killed):
                pid = next(iter(loader_processes(process.pid)), None)
                if pid is not None and pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            time.sleep(0.02)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert killed
    assert losses(tmp_path / "run") == losses(reference)
    assert bad_samples(tmp_path / "run") == bad_samples(reference)
