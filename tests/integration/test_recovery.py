"""Runs that are killed, stopped, or robbed of their disk, and go on as if nothing had happened.

Every comparison is bit for bit: float32 on the CPU, the same world and stage.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.launch import launch, metrics, start
from tests.integration.test_training import contents, ds_config, flags, losses, require_same_run

NUM_STEPS = 12


def command(demo_folder: Path, out: Path, *extra: str, stage: int = 2) -> list[str]:
    words = ["--run.save-every-steps", "2", "--ds-config", ds_config(f"zero{stage}"), *extra]
    return flags(demo_folder, out, *words, steps=NUM_STEPS)


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The training processes of a launch that is under way, by rank."""
    found: dict[int, psutil.Process] = {}
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:  # it has ended
        return found
    for child in children:
        try:
            if "everest_ds" in child.cmdline() and "RANK" in (environment := child.environ()):
                found[int(environment["RANK"])] = child
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.01)


def steps_recorded(run_dir: Path) -> int:
    return len(metrics(run_dir)) if (run_dir / "metrics.jsonl").is_file() else 0


def is_saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("tmp-*"))


@pytest.fixture(scope="module")
def uninterrupted(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Whole runs on two processes, by ZeRO stage, made when first asked for."""

    class Runs(dict[int, Path]):
        def __missing__(self, stage: int) -> Path:
            out = tmp_path_factory.mktemp("runs") / f"zero{stage}"
            done = launch(command(demo_folder, out, stage=stage), processes=2)
            assert done.returncode == 0, done.stderr
            self[stage] = out
            return out

    return Runs()


def kill_once(arguments: list[str], run_dir: Path, draw: random.Random, *, within_save: bool) -> bool:
    """Start the command and kill -9 a rank; return whether it was killed before the run's end.

    Within a save, the moment is drawn from the time that the temporary folder exists; otherwise from the time
    that the run takes.
    """
    with start(arguments, processes=2) as process:
        if within_save:
            wait_until(lambda: is_saving(run_dir), process)
            time.sleep(draw.uniform(0, 0.08))
        else:
            wait_until(lambda: len(ranks_of(process)) == 2, process)
            time.sleep(draw.uniform(3, 16))
        victims = ranks_of(process)
        killed = process.poll() is None and len(victims) == 2
        if killed:
            victims[draw.randrange(2)].kill()
        process.communicate(timeout=180)
        return killed


def run_to_the_end(arguments: list[str]) -> None:
    done = launch(arguments, processes=2)
    assert done.returncode == 0, done.stderr


def test_run_killed_within_a_save_ends_as_if_nothing_had_happened(
    uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    """The short campaign: one kill within a save; the same command again goes on."""
    seed = int(os.environ.get("EVEREST_KILL_SEED", time.time_ns() % 10**6))
    print(f"EVEREST_KILL_SEED={seed}")
    broken = tmp_path / "broken"
    assert kill_once(command(demo_folder, broken), broken, random.Random(seed), within_save=True)
    run_to_the_end(command(demo_folder, broken))
    require_same_run(broken, uninterrupted[2])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_campaign_of_kills_changes_no_loss(
    stage: int, uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    """Twelve kills a stage, every other one within a save; the same command each time, then to the end.

    A run that reaches its end under way gives way to a new one.
    """
    seed = int(os.environ.get("EVEREST_KILL_SEED", time.time_ns() % 10**6))
    print(f"EVEREST_KILL_SEED={seed}")
    draw, num_kills, runs = random.Random(seed), 0, [tmp_path / "run0"]
    while num_kills < 12:
        arguments = command(demo_folder, runs[-1], stage=stage)
        num_kills += kill_once(arguments, runs[-1], draw, within_save=num_kills % 2 == 0)
        if has_ended(runs[-1]):
            runs.append(tmp_path / f"run{len(runs)}")
    for run_dir in runs:
        run_to_the_end(command(demo_folder, run_dir, stage=stage))
        assert losses(run_dir) == losses(uninterrupted[stage])
    print(f"{num_kills} kills in {len(runs)} runs at stage {stage}")


def has_ended(run_dir: Path) -> bool:
    recorded = (run_dir / "metrics.jsonl").is_file()
    return recorded and any(event["event"] == "end" for event in metrics(run_dir, "event"))


def test_sigterm_to_one_rank_saves_on_all_and_the_same_command_goes_on(
    uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    """With loader processes, which must not die of a signal to the whole tree. Step 5 is inside an epoch."""
    run_dir = tmp_path / "run"
    arguments = command(demo_folder, run_dir, "--run.save-every-steps", "100", "--data.num-workers", "2")
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
    assert f"SIGTERM: stopped after step {event['step']} of {NUM_STEPS}, all saved" in stdout
    assert "Traceback" not in stderr
    run_to_the_end(arguments)
    require_same_run(run_dir, uninterrupted[2])


@pytest.mark.slow
def test_second_signal_ends_the_process_at_once(demo_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(demo_folder, run_dir, "--run.save-every-steps", "100")
    with start(arguments) as process:
        wait_until(lambda: steps_recorded(run_dir) >= 1, process)
        # Stopped, it cannot reach the end of its step between the two.
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        time.sleep(2.2)
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGUSR1, 75)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for two checkpoints of the demo."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_a_clear_error_and_the_previous_checkpoint_loads(
    small_disk: Path, uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    run_dir = small_disk / "run"
    arguments = command(demo_folder, run_dir)
    full = launch(arguments, processes=2)
    assert full.returncode == 2
    assert full.stderr.count("everest: error") == 1
    assert "no checkpoint could be written" in full.stderr
    assert "MiB are free; earlier ones are kept" in full.stderr
    assert "Traceback" not in full.stderr
    shutil.copytree(run_dir, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("tmp-*"))
    run_to_the_end(command(demo_folder, tmp_path / "run"))
    require_same_run(tmp_path / "run", uninterrupted[2])


@pytest.mark.slow
def test_quota_that_ends_during_a_save_is_a_clear_error(
    uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    """Free space says yes and the write says no, as under a quota: here a limit on the size of a file."""
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted[2], run_dir)
    before = contents(run_dir / "checkpoints")
    limited = ["bash", "-c", 'ulimit -f 2000; trap "" XFSZ; exec "$@"', "bash"]
    words = flags(demo_folder, run_dir, "--ds-config", ds_config("zero2"), steps=NUM_STEPS + 1)
    done = launch(words, processes=2, prefix=limited)
    assert done.returncode == 2
    assert "no checkpoint could be written" in done.stderr
    assert "earlier ones are kept" in done.stderr
    after = contents(run_dir / "checkpoints")
    assert before == {name: data for name, data in after.items() if not name.startswith("tmp-")}


def newest(run_dir: Path) -> Path:
    return sorted((run_dir / "checkpoints").glob("step-*/complete.json"))[-1].parent


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "step-00009999\n"])
def test_pointer_that_is_empty_or_names_nothing_is_named_and_survived(
    text: str, uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted[2], run_dir)
    pointer = run_dir / "checkpoints" / "latest"
    pointer.write_text(text)
    before = contents(run_dir)
    named = launch([*command(demo_folder, run_dir), "--resume", str(run_dir)])
    assert named.returncode == 2
    what = "is empty" if not text else "names 'step-00009999', which is no complete checkpoint"
    assert f"{pointer} {what}" in named.stderr
    assert contents(run_dir) == before
    auto = launch(command(demo_folder, run_dir), processes=2)
    assert auto.returncode == 0, auto.stderr
    assert f"warning: {pointer} {what}; the newest complete checkpoint counts" in auto.stdout
    assert f"resumed from {newest(run_dir)}" in auto.stdout


def flip_bytes(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(byte ^ 0xFF for byte in data[middle : middle + 64])
    shard.write_bytes(data)


def truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip_bytes, "the checksum of {} differs"),
    (truncate, "{} has "),
    (Path.unlink, "{} is missing"),
]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_of_any_shard_is_named_survived_on_auto_and_an_error_by_name(
    damage: Callable[[Path], None], message: str, stage: int, uninterrupted: dict[int, Path], demo_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Each kind of file in turn: a rank's optimiser states, model states, the state file."""
    sound = newest(uninterrupted[stage])
    for name in sorted(path.name for path in sound.iterdir() if path.name != "complete.json"):
        run_dir = tmp_path / name
        shutil.copytree(uninterrupted[stage], run_dir)
        damage(run_dir / "checkpoints" / sound.name / name)
        before = contents(run_dir)
        arguments = command(demo_folder, run_dir, stage=stage)
        by_name = launch([*arguments, "--resume", str(run_dir / "checkpoints" / sound.name)], processes=2)
        assert by_name.returncode == 2
        assert message.format(name) in by_name.stderr
        assert contents(run_dir) == before
        auto = launch(arguments, processes=2)
        assert auto.returncode == 0, auto.stderr
        assert message.format(name) in auto.stdout
        assert losses(run_dir) == losses(uninterrupted[stage])


@pytest.mark.slow
def test_state_of_a_newer_format_is_refused(
    uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted[2], run_dir)
    state = newest(run_dir) / "state.json"
    raw = json.loads(state.read_text())
    state.write_text(json.dumps({**raw, "format": 99}))
    seal = state.with_name("complete.json")
    sealed = json.loads(seal.read_text())
    sealed["files"].pop("state.json")  # a newer version would have sealed it
    seal.write_text(json.dumps(sealed))
    before = contents(run_dir)
    done = launch(command(demo_folder, run_dir), processes=2)
    assert done.returncode == 2
    assert "has format 99; this version of everest_ds reads up to 1: update it" in done.stderr
    assert done.stderr.count("everest: error") == 1
    assert contents(run_dir) == before
