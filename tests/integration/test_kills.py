"""Kill any process of a launch at any time: no step is lost or changed, and no process or file is left over.

All comparisons are bitwise: float32 on the CPU, same world and stage.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.integration.interrupting import wait_until
from tests.integration.launch import (
    RECOVERY_STEPS,
    losses,
    metrics,
    recovery_command,
    require_same_run,
    run_to_the_end,
    start,
)
from tests.integration.test_recovery import is_saving, kill_seed, ranks_of, sealed, steps_recorded

GONE_WITHIN_S = 10.0
# Processes to kill: a rank at any time and within a save, a writer and a converter only while they work.
VICTIMS = ("rank", "launcher", "node", "loader", "saving rank", "writer", "converter")
NUM_KILLS = int(os.environ.get("EVEREST_KILLS", "35"))  # a stage


def members_of(process: subprocess.Popen[str], module: str) -> list[psutil.Process]:
    """The processes of a launch that run a module, or Python's fork server (`forkserver`)."""
    found = []
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:  # it has ended
        return []
    for child in children:
        try:
            if any(module in word for word in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def find_victims(victim: str, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of a running launch that can be killed; empty if there are none of that kind yet."""
    if process.poll() is not None:
        return []
    if victim == "launcher":
        return [psutil.Process(process.pid)]
    if victim == "node":
        return members_of(process, "deepspeed.launcher.launch")
    if victim == "loader":
        return members_of(process, "forkserver")
    if victim == "writer":
        return list(ranks_of(process, writers=True).values())
    if victim == "converter":
        return members_of(process, "checkpoints.converter")
    return list(ranks_of(process).values())


def num_starts(run_dir: Path) -> int:
    """How often the run has started or resumed; each time, its record is cut to the step where it continues."""
    if not (run_dir / "metrics.jsonl").is_file():
        return 0
    return sum(event["event"] in ("start", "resume") for event in metrics(run_dir, "event"))


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return int(sealed(run_dir)[-1].name.removeprefix("step-")) if sealed(run_dir) else 0


def strike(victim: str, arguments: list[str], run_dir: Path, draw: random.Random, *, complete: int = 0) -> bool:
    """Launch a run, kill one of its processes, and require that all others end.

    A killed loader process is replaced by its rank, and the launch continues.

    Args:
        victim: One of VICTIMS.
        arguments: Arguments of `everest`, without loader processes.
        run_dir: Directory of the run.
        draw: Random generator that chooses the moment and the process.
        complete: For kills within a save: how many checkpoints must be complete before.

    Returns:
        Whether a process was killed: the run may end before.
    """
    words, processes, before, saved = list(arguments), 2, num_starts(run_dir), newest_step(run_dir)
    if victim == "loader":
        words += ["--data.num-workers", "2"]
    if victim == "converter":  # another world: the checkpoint is converted, and no step is taken
        words += ["--run.max-steps", str(saved)]
        processes = 1
    with start(words, processes=processes) as process:

        def is_due() -> bool:
            return num_starts(run_dir) > before and len(sealed(run_dir)) >= complete and is_saving(run_dir)

        if victim == "converter":
            wait_until(lambda: any((run_dir / "checkpoints").glob("tmp-universal-*")), process)
            time.sleep(draw.uniform(0, 1))
        elif victim in ("saving rank", "writer"):
            wait_until(is_due, process)
            time.sleep(draw.uniform(0, 0.06))
        elif draw.random() < 0.3:  # while it starts
            wait_until(lambda: len(ranks_of(process)) == 2, process)
            time.sleep(draw.uniform(0, 5))
        else:
            after = saved + draw.randrange(1, 4)
            wait_until(lambda: num_starts(run_dir) > before and steps_recorded(run_dir) >= after, process)
        victims = find_victims(victim, process)
        if not victims:
            finish(process)
            return False
        members = psutil.Process(process.pid).children(recursive=True)
        draw.choice(victims).kill()
        if victim not in ("launcher", "node"):  # the launch ends by itself, and no process may outlive it
            finish(process)
        _, left = psutil.wait_procs(members, timeout=GONE_WITHIN_S)
        assert left == [], (victim, [member.cmdline() for member in left])
        process.communicate(timeout=GONE_WITHIN_S)
    return True


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a launch to end, and read its output."""
    process.communicate(timeout=180)


def has_ended(run_dir: Path) -> bool:
    return steps_recorded(run_dir) > 0 and metrics(run_dir)[-1]["step"] == RECOVERY_STEPS and not is_saving(run_dir)


def require_nothing_left(run_dir: Path) -> None:
    """Require no unfinished save, no unfinished conversion and no unknown file."""
    entries = [path.name for path in (run_dir / "checkpoints").iterdir()]
    known = ("step-", "universal-step-", "latest", "best", "zero_to_")
    assert [name for name in entries if not name.startswith(known)] == []
    assert list(run_dir.rglob("*.partial")) == []


def test_writer_loader_and_converter_are_killed_and_the_run_is_the_same(
    uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    """The short campaign; `test_recovery` and `test_launchers_end` kill ranks and launchers by default."""
    run_dir, draw = tmp_path / "run", random.Random(kill_seed())
    arguments = recovery_command(demo_folder, run_dir)
    assert strike("writer", arguments, run_dir, draw, complete=1)
    strike("converter", arguments, run_dir, draw)
    assert newest_step(run_dir) < RECOVERY_STEPS
    assert strike("loader", arguments, run_dir, draw)
    run_to_the_end(arguments)
    require_same_run(run_dir, uninterrupted[2])
    require_nothing_left(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_campaign_of_kills_changes_no_loss(
    stage: int, uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    """Kills of all kinds in turn, always with the same command; a finished run is followed by a new one."""
    draw, kills, runs = random.Random(kill_seed()), Counter[str](), [tmp_path / "run0"]
    for attempt in range(3 * NUM_KILLS):
        if kills.total() >= NUM_KILLS:
            break
        victim = VICTIMS[attempt % len(VICTIMS)]
        if victim == "converter" and not sealed(runs[-1]):
            victim = "saving rank"
        began = time.monotonic()
        arguments = recovery_command(demo_folder, runs[-1], stage=stage)
        killed = strike(victim, arguments, runs[-1], draw, complete=draw.randrange(1, 4))
        kills[victim] += killed
        took_s = time.monotonic() - began
        print(f"{victim} {'killed' if killed else 'was not there'}, {took_s:.0f} s, step {newest_step(runs[-1])}")
        if has_ended(runs[-1]):
            runs.append(tmp_path / f"run{len(runs)}")
    for run_dir in runs:
        run_to_the_end(recovery_command(demo_folder, run_dir, stage=stage))
        assert losses(run_dir) == losses(uninterrupted[stage])
        require_nothing_left(run_dir)
    print(f"{dict(kills)} in {len(runs)} runs at stage {stage}")
    assert kills.total() >= NUM_KILLS
