"""Checkpoints written in the background: same files as with blocking saves, and kills of writers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from everest_ds.data.demo import DemoConfig, write_demo_data
from tests.integration.launch import (
    SMALL,
    compute,
    contents,
    ds_config,
    flags,
    metrics,
    recovery_command,
    require_same_run,
    run_to_the_end,
    start,
)
from tests.integration.test_finetune import finetune
from tests.integration.test_recovery import is_saving, ranks_of, sealed

GONE_WITHIN_S = 10


def pretraining(stage: str, *extra: str) -> Callable[[Path, Path], list[str]]:
    words = ("--run.save-every-steps", "2", "--ds-config", ds_config(stage), *SMALL, *extra)
    return lambda folder, out: flags(folder, out, *words, steps=4)


def averaging(folder: Path, out: Path) -> list[str]:
    """Arguments of a fine-tuning with scores, a best checkpoint and an average of the weights."""
    return finetune(folder, out, "--run.save-every-steps", "1", steps=4)


def sealed_content(run_dir: Path) -> dict[str, Any]:
    """Every file below checkpoints, seals parsed, without config.json, which names the kind of saving."""
    files: dict[str, Any] = contents(run_dir / "checkpoints")
    for name in [name for name in files if name.endswith("complete.json")]:
        files[name] = json.loads(files[name])["files"]
        assert files[name].pop("config.json")
    return {name: content for name, content in files.items() if not name.endswith("config.json")}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(pretraining("zero0"), id="zero0", marks=pytest.mark.slow),
        pytest.param(pretraining("zero1", "--precision", "bf16"), id="zero1-bf16", marks=pytest.mark.slow),
        pytest.param(pretraining("zero2", "--optim.gradients", "deepspeed"), id="zero2", marks=pytest.mark.slow),
        pytest.param(pretraining("zero3"), id="zero3", marks=pytest.mark.slow),
        pytest.param(pretraining("zero3_offload"), id="zero3-offload", marks=pytest.mark.slow),
        pytest.param(averaging, id="zero2-average"),
    ],
)
def test_checkpoints_written_behind_are_byte_for_byte_those_of_a_standstill(
    words: Callable[[Path, Path], list[str]], tmp_path: Path
) -> None:
    write_demo_data(tmp_path / "demo", DemoConfig(train=128, val=11, test=0))
    runs = {}
    for way in ("save-async", "no-save-async"):
        run_dir = tmp_path / way
        done = compute([*words(tmp_path / "demo", run_dir), f"--run.{way}"], processes=2)
        assert done.returncode == 0, done.stderr
        runs[way] = sealed_content(run_dir)
    behind, standing = runs.values()
    assert len([name for name in behind if name.endswith("complete.json")]) >= 2
    assert behind == standing


def halt_writers(process: subprocess.Popen[str], run_dir: Path) -> dict[int, psutil.Process]:
    """Suspend the writers of a launch during a save, after a checkpoint is complete; return them by rank."""
    while process.poll() is None:
        if not (is_saving(run_dir) and sealed(run_dir)):
            continue
        writers = ranks_of(process, writers=True)
        for writer in writers.values():
            writer.suspend()
        if is_saving(run_dir) and not list((run_dir / "checkpoints").glob("tmp-*/complete.json")):
            return writers
        for writer in writers.values():
            writer.resume()
    raise AssertionError("no save was met")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["writer", "rank", "launcher"])
def test_kill_while_a_writer_writes_leaves_no_process_and_the_run_resumes_bitwise(
    victim: str, uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    """The writers are suspended, as on a hanging disk, when one, its rank, or the launcher is killed."""
    run_dir = tmp_path / "run"
    words = recovery_command(demo_folder, run_dir)
    with start(words, processes=2) as process:
        writers = halt_writers(process, run_dir)
        assert sorted(writers) == [0, 1]
        complete = sealed(run_dir)
        members = psutil.Process(process.pid).children(recursive=True)
        {"writer": writers[1], "rank": ranks_of(process)[1], "launcher": process}[victim].kill()
        _, stderr = process.communicate(timeout=120)
        _, left = psutil.wait_procs(members, timeout=GONE_WITHIN_S)
        assert left == []
    assert sealed(run_dir) == complete
    if victim == "writer":
        assert process.returncode == 2
        assert stderr.count("everest: error") == 1
        assert f"the process that writes it (pid {writers[1].pid}) was ended by SIGKILL; earlier ones are" in stderr
        assert "Traceback" not in stderr
        assert not is_saving(run_dir)
    run_to_the_end(words)
    assert not is_saving(run_dir)
    require_same_run(run_dir, uninterrupted[2])
    assert len(metrics(run_dir)) == len(metrics(uninterrupted[2]))
