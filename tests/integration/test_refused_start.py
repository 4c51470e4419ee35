"""A start that is refused leaves nothing behind, on any rank, and the corrected command runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.integration.launch import compute, cpu_environment, flags


def run_ranks(words: list[str], world_size: int, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Start every rank as a launcher does, on a machine without decord."""
    (folder / "without" / "decord").mkdir(parents=True)
    missing = "raise ModuleNotFoundError('No module named decord', name='decord')"
    (folder / "without" / "decord" / "__init__.py").write_text(missing)
    environment = cpu_environment(PYTHONPATH=f"{folder / 'without'}:{REPOSITORY}", WORLD_SIZE=str(world_size))
    processes = [
        subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", "everest_ds", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]
    done = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=120)
        done.append(subprocess.CompletedProcess(words, process.returncode, stdout, stderr))
    return done


@pytest.mark.parametrize("world_size", [1, 2])
def test_reader_that_is_not_installed_is_refused_before_anything_is_written(
    world_size: int, demo_folder: Path, tmp_path: Path
) -> None:
    """Each rank refuses by itself, without torch and the other ranks."""
    out = tmp_path / "run"
    words = flags(demo_folder, out, "--selection.alpha", "1.5", steps=1)
    done = run_ranks([*words, "--data.reader", "decord"], world_size, tmp_path)
    assert [one.returncode for one in done] == [2] * world_size
    said = [line for one in done for line in one.stderr.splitlines() if line.startswith("everest: error:")]
    assert len(said) == 1
    assert "data.reader=decord is not available: not installed" in said[0]
    assert all("| torch\n" not in one.stderr for one in done)
    assert not out.exists()
    corrected = compute([*words, "--data.reader", "pyav"], processes=world_size)
    assert corrected.returncode == 0, corrected.stderr
    assert (out / "media" / "frames.jsonl").is_file()


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(demo_folder: Path, tmp_path: Path) -> None:
    """The last possible refusal of a start: the model is built and all processes are connected."""
    weights, out = tmp_path / "weights.safetensors", tmp_path / "run"
    weights.write_bytes(b"no weights")
    words = flags(demo_folder, out, "--selection.alpha", "1.5", steps=1)
    done = compute([*words, "--init-from", str(weights)], processes=2)
    assert done.returncode == 2, done.stderr
    assert str(weights) in done.stderr
    assert not out.exists()
