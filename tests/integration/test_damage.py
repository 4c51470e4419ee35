"""Full disks, damaged files and dangling pointers are named, and no checkpoint is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.launch import (
    RECOVERY_STEPS,
    contents,
    ds_config,
    flags,
    launch,
    losses,
    recovery_command,
    require_same_run,
    run_to_the_end,
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system with space for two checkpoints of the demo."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk_is_a_clear_error_and_the_previous_checkpoint_loads(
    small_disk: Path, uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    run_dir = small_disk / "run"
    arguments = recovery_command(demo_folder, run_dir)
    full = launch(arguments, processes=2)
    assert full.returncode == 2
    assert full.stderr.count("everest: error") == 1
    assert "no checkpoint could be written" in full.stderr
    assert "MiB are free; earlier ones are kept" in full.stderr
    assert "Traceback" not in full.stderr
    shutil.copytree(run_dir, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("tmp-*"))
    run_to_the_end(recovery_command(demo_folder, tmp_path / "run"))
    require_same_run(tmp_path / "run", uninterrupted[2])


@pytest.mark.slow
def test_quota_that_ends_during_a_save_is_a_clear_error(
    uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    """There is free space but writing fails, as under a quota; simulated by a limit on the size of a file."""
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted[2], run_dir)
    before = contents(run_dir / "checkpoints")
    limited = ["bash", "-c", 'ulimit -f 2000; trap "" XFSZ; exec "$@"', "bash"]
    words = flags(demo_folder, run_dir, "--ds-config", ds_config("zero2"), steps=RECOVERY_STEPS + 1)
    words.append("--run.no-save-async")  # copies in host memory are files, too, and refused at the start
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
    named = launch([*recovery_command(demo_folder, run_dir), "--resume", str(run_dir)])
    assert named.returncode == 2
    what = "is empty" if not text else "names 'step-00009999', which is not a complete checkpoint"
    assert f"{pointer} {what}" in named.stderr
    assert contents(run_dir) == before
    auto = launch(recovery_command(demo_folder, run_dir), processes=2)
    assert auto.returncode == 0, auto.stderr
    assert f"warning: {pointer} {what}; the newest complete checkpoint is used instead" in auto.stdout
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
        # state.json is read before checksums are compared, so its own fault is reported.
        expected = "state.json" if name == "state.json" else message.format(name)
        arguments = recovery_command(demo_folder, run_dir, stage=stage)
        by_name = launch([*arguments, "--resume", str(run_dir / "checkpoints" / sound.name)], processes=2)
        assert by_name.returncode == 2
        assert expected in by_name.stderr
        assert contents(run_dir) == before
        auto = launch(arguments, processes=2)
        assert auto.returncode == 0, auto.stderr
        assert expected in auto.stdout + auto.stderr
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
    done = launch(recovery_command(demo_folder, run_dir), processes=2)
    assert done.returncode == 2
    assert "has format 99; this version of everest_ds reads up to 2: update it" in done.stderr
    assert done.stderr.count("everest: error") == 1
    assert contents(run_dir) == before
