"""Killed or stopped runs resume as if they had never been interrupted.

All comparisons are bitwise: float32 on the CPU, same world and stage.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from everest_ds.train.checkpoints.saving.writer import NAME as WRITER
from tests.integration.interrupting import wait_until
from tests.integration.launch import (
    RECOVERY_STEPS,
    compute,
    launch,
    metrics,
    recovery_command,
    require_same_run,
    run_to_the_end,
    start,
)


def ranks_of(process: subprocess.Popen[str], *, writers: bool = False) -> dict[int, psutil.Process]:
    """The training processes of a running launch by rank, or the processes that write their checkpoints."""
    found: dict[int, psutil.Process] = {}
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:  # it has ended
        return found
    for child in children:
        try:
            is_asked_for = "everest_ds" in child.cmdline() and (child.name() == WRITER) == writers
            if is_asked_for and "RANK" in (environment := child.environ()):
                found[int(environment["RANK"])] = child
        except psutil.Error:
            continue
    return found


def kill_seed() -> int:
    """The seed of a campaign: it is printed, and can be set in the environment to repeat one."""
    drawn = int(os.environ.get("EVEREST_KILL_SEED", time.time_ns() % 10**6))
    print(f"EVEREST_KILL_SEED={drawn}")
    return drawn


def steps_recorded(run_dir: Path) -> int:
    return len(metrics(run_dir)) if (run_dir / "metrics.jsonl").is_file() else 0


def sealed(run_dir: Path) -> list[Path]:
    return sorted(path.parent for path in (run_dir / "checkpoints").glob("step-*/complete.json"))


def is_saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("tmp-*"))


@pytest.mark.slow  # the runs that are killed say the same by default
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    """The run stops inside its second epoch and resumes there."""
    for steps in (6, 12):
        done = launch(
            [*recovery_command(demo_folder, tmp_path / "run"), "--run.max-steps", str(steps)], processes=2
        )
        assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006"
    went_on = "step 6, epoch 1, 192 samples; 2 processes at ZeRO-2 then, 2 at ZeRO-2 now"
    assert f"resumed from {checkpoint}: {went_on}" in done.stdout
    require_same_run(tmp_path / "run", uninterrupted[2])


def kill_within_a_save(arguments: list[str], run_dir: Path, draw: random.Random, *, complete: int) -> bool:
    """Start the command and kill -9 a rank during a save, after that many checkpoints are complete.

    Returns:
        Whether the rank was killed before the run ended.
    """
    with start(arguments, processes=2) as process:
        wait_until(lambda: is_saving(run_dir) and len(sealed(run_dir)) >= complete, process)
        time.sleep(draw.uniform(0, 0.08))
        victims = ranks_of(process)
        killed = process.poll() is None and len(victims) == 2
        if killed:
            victims[draw.randrange(2)].kill()
        process.communicate(timeout=180)
        return killed


def test_run_killed_within_a_save_and_then_damaged_ends_as_if_nothing_had_happened(
    uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    """The short campaign: a kill within the third save, then 64 bytes of the newest checkpoint flip."""
    seed = kill_seed()
    broken = tmp_path / "broken"
    arguments = recovery_command(demo_folder, broken)
    assert kill_within_a_save(arguments, broken, random.Random(seed), complete=2)
    newest = sealed(broken)[-1]
    shard = next(newest.glob("*rank_1*optim_states.pt"))
    damaged = bytearray(shard.read_bytes())
    damaged[1000:1064] = bytes(byte ^ 0xFF for byte in damaged[1000:1064])
    shard.write_bytes(damaged)
    done = compute(arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {newest} is damaged: the checksum of {shard.name} differs; skipping it" in done.stdout
    require_same_run(broken, uninterrupted[2])


def test_sigterm_to_one_rank_saves_on_all_and_the_same_command_goes_on(
    uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    """With loader processes, which must not die of a signal to the whole tree. Step 5 is inside an epoch."""
    run_dir = tmp_path / "run"
    arguments = recovery_command(demo_folder, run_dir, "--run.save-every-steps", "100", "--data.num-workers", "2")
    with start(arguments, processes=2) as process:
        wait_until(lambda: steps_recorded(run_dir) >= 5, process)
        at_signal = steps_recorded(run_dir)
        rank = ranks_of(process)[1]
        for member in [*rank.children(recursive=True), rank]:
            member.terminate()
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    (event,) = (event for event in metrics(run_dir, "event") if event["event"] == "stopped")
    assert event["signal"] == "SIGTERM"
    assert at_signal <= event["step"] <= at_signal + 2  # a step may end while the signal is on its way
    assert f"SIGTERM: stopped after step {event['step']} of {RECOVERY_STEPS}, all saved" in stdout
    assert "Traceback" not in stderr
    run_to_the_end([*arguments, "--data.num-workers", "0"])
    require_same_run(run_dir, uninterrupted[2])
