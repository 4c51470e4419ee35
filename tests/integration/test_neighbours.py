"""Complete runs that meet foreign files, torn files, and data that changed since the last start."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from everest_ds.data.demo import DemoConfig, write_demo_data
from tests.integration.launch import SMALL, compute, contents, ds_config, flags, losses, metrics

NEWEST, OLDEST = "step-00000004", "step-00000002"


def words(demo_folder: Path, out: Path, *extra: str, steps: int = 6) -> list[str]:
    """Arguments of a run that saves every two steps and draws its frames."""
    more = ("--run.save-every-steps", "2", "--ds-config", ds_config("zero2"), "--selection.alpha", "1.5")
    return flags(demo_folder, out, *more, *SMALL, *extra, steps=steps)


def succeed(arguments: list[str], processes: int = 1) -> str:
    done = compute(arguments, processes=processes)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(arguments: list[str]) -> str:
    done = compute(arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def whole(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of six uninterrupted steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    succeed(words(demo_folder, out))
    return losses(out)


@pytest.fixture(scope="module")
def saved(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "run"
    succeed(words(demo_folder, out, steps=4))
    return out


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of a run with two checkpoints, which a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def warnings(stdout: str) -> list[str]:
    return [line for line in stdout.splitlines() if line.startswith("warning: ")]


def test_odd_neighbours_of_checkpoints_are_left_alone(run: Path, demo_folder: Path, whole: list[float]) -> None:
    folder = run / "checkpoints"
    for name in ("step-backup", f"{NEWEST} (copy)", "step-00000099", f"old/{NEWEST}", f"{NEWEST}.bak", "step-5"):
        shutil.copytree(folder / NEWEST, folder / name)
    (folder / "step-00000098").symlink_to(NEWEST)
    (folder / "step-00000097").symlink_to("nowhere")
    for name in ("tmp-notes", "step-00000006", "tmp-step-00000006", "universal-step-00000006", "step-x"):
        (folder / name).write_text(name)
    for name in ("latest", "best"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        (folder / name / "mine").write_text(name)
    (folder / OLDEST / "state.json").write_text('{"step": ')
    before = set(contents(folder).values())
    said = succeed(words(demo_folder, run, "--run.keep-checkpoints", "1"))
    assert f"resumed from {folder / NEWEST}: step 4" in said
    assert losses(run) == whole
    assert (folder / "latest").read_text() == "step-00000006\n"
    assert (folder / "step-00000006" / "complete.json").is_file()
    assert len([line for line in warnings(said) if "are left alone" in line]) == 1
    assert not (folder / NEWEST).exists()  # only this one was pruned
    assert before <= set(contents(folder).values())
    again = succeed(words(demo_folder, run, steps=6))
    assert f"resumed from {folder / 'step-00000006'}" in again


def drop_shard(checkpoint: Path) -> None:
    seal = json.loads((checkpoint / "complete.json").read_text())
    del seal["files"]["zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    (checkpoint / "complete.json").write_text(json.dumps(seal))


def replace_by_folder(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()
    (checkpoint / "state.json").mkdir()


@pytest.mark.parametrize("damage", [drop_shard, replace_by_folder])
def test_seal_that_is_not_one_of_its_checkpoint_falls_back(
    damage: Callable[[Path], None], run: Path, demo_folder: Path, whole: list[float]
) -> None:
    damage(run / "checkpoints" / NEWEST)
    said = succeed(words(demo_folder, run))
    assert f"warning: checkpoint {run / 'checkpoints' / NEWEST} is damaged" in said
    assert f"resumed from {run / 'checkpoints' / OLDEST}" in said
    assert losses(run) == whole


PATCHED = """
import errno, os, runpy, sys
from pathlib import Path
from everest_ds.train.checkpoints import seal

def die_half_way(self, data, name=os.environ.get("TORN"), write=Path.write_bytes):
    if self.name == f".{name}.partial":
        write(self, data[: len(data) // 2])
        os._exit(77)
    return write(self, data)

def fill_disk(file, name=os.environ.get("FULL"), sync=os.fsync):
    if os.readlink(f"/proc/self/fd/{file}").endswith(f".{name}.partial"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    sync(file)

def refuse_to_read(path, name=os.environ.get("UNREADABLE"), read=seal.sha256):
    if path.parent.name == name and os.environ["RANK"] == "1":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return read(path)

Path.write_bytes, os.fsync, seal.sha256 = die_half_way, fill_disk, refuse_to_read
runpy.run_module("everest_ds", run_name="__main__", alter_sys=True)
"""


def compute_patched(
    tmp_path: Path, arguments: list[str], processes: int = 1, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run with a failing disk or a kill, as set by the environment."""
    program = tmp_path / "patched.py"
    program.write_text(PATCHED)
    return compute(arguments, module=program, processes=processes, environment=environment)


def test_checkpoint_that_one_rank_cannot_read_is_passed_over_by_all(
    run: Path, demo_folder: Path, whole: list[float], tmp_path: Path
) -> None:
    done = compute_patched(tmp_path, words(demo_folder, run), processes=2, UNREADABLE=NEWEST)
    assert done.returncode == 0, done.stderr
    assert "cannot be read: [Errno 5] Input/output error; skipping it" in done.stdout
    assert f"resumed from {run / 'checkpoints' / OLDEST}" in done.stdout
    assert losses(run) == pytest.approx(whole, rel=1e-6)  # on one process or two


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "latest"])
def test_kill_while_a_file_is_rewritten_changes_nothing(
    name: str, run: Path, demo_folder: Path, whole: list[float], tmp_path: Path
) -> None:
    path = run / "checkpoints" / name if name == "latest" else run / name
    before = path.read_bytes()
    arguments = words(demo_folder, run, "--run.keep-checkpoints", "3")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 5}\n')
    done = compute_patched(tmp_path, arguments, TORN=name)
    if name == "latest":  # the process that writes checkpoints has died, and its rank says so
        assert done.returncode == 2
        assert "ended with exit code 77; earlier ones are kept" in done.stderr
    else:
        assert done.returncode == 77, done.stderr
    assert name == "metrics.jsonl" or path.read_bytes() == before
    succeed(arguments)
    assert losses(run) == whole
    assert not list(run.rglob("*.partial"))


def test_start_on_a_full_disk_does_not_bar_the_next(demo_folder: Path, tmp_path: Path, whole: list[float]) -> None:
    run = tmp_path / "run"
    for name in ("config.json", "ds_config.json"):
        done = compute_patched(tmp_path, words(demo_folder, run), FULL=name)
        assert done.returncode == 2
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
    (run / "config.json").write_text("")  # like a disk that reports too late that it is full
    assert "config.json is not JSON" in succeed(words(demo_folder, run))
    assert losses(run) == whole


def test_files_that_do_not_change_are_not_written_again(run: Path, demo_folder: Path) -> None:
    files = [run / name for name in ("config.json", "ds_config.json", "environment.json")]
    succeed(words(demo_folder, run, steps=4))
    before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in files]
    succeed(words(demo_folder, run, steps=4))
    assert [(path.stat().st_mtime_ns, path.stat().st_ino) for path in files] == before


@pytest.mark.parametrize("text", [b'{"recipe": "dem', None])
def test_lost_configuration_is_the_checkpoints_own(
    text: bytes | None, run: Path, demo_folder: Path, whole: list[float]
) -> None:
    (run / "config.json").unlink()
    if text is not None:
        (run / "config.json").write_bytes(text)
    before = contents(run)
    assert "and is now 1.0; use the stored settings" in refuse(words(demo_folder, run, "--optim.base-lr", "1"))
    assert contents(run) == before
    said = succeed(words(demo_folder, run))
    assert f"it is written again, after comparison with {run / 'checkpoints' / NEWEST / 'config.json'}" in said
    assert losses(run) == whole
    json.loads((run / "config.json").read_text())


def test_lost_configuration_of_an_older_run_is_checked_against_the_state(run: Path, demo_folder: Path) -> None:
    (run / "config.json").write_text("")
    for checkpoint in (run / "checkpoints").glob("step-*"):
        (checkpoint / "config.json").unlink()
        seal = json.loads((checkpoint / "complete.json").read_text())
        del seal["files"]["config.json"]
        (checkpoint / "complete.json").write_text(json.dumps(seal))
    other = refuse(words(demo_folder, run, "--batch.global-size", "16", "--batch.micro-size", "16"))
    assert "was trained with batch.global_size=32, now 16" in other
    assert "it is written again with the settings of this command" in succeed(words(demo_folder, run))


@pytest.mark.parametrize("way", ["empty", "unsealed", "dangling"])
def test_record_without_its_checkpoints_is_not_cut(way: str, run: Path, demo_folder: Path) -> None:
    folder = run / "checkpoints"
    if way == "unsealed":
        for seal in folder.glob("*/complete.json"):
            seal.unlink()
    else:
        shutil.rmtree(folder)
        if way == "empty":
            folder.mkdir()
        else:
            folder.symlink_to("/mnt/unmounted")
    before = contents(run)
    said = refuse(words(demo_folder, run))
    assert "says that step 4 was saved" in said
    assert "mount or restore that folder to continue, or rename metrics.jsonl to start afresh" in said
    assert contents(run) == before
    if way == "empty":
        (run / "metrics.jsonl").rename(run / "metrics.old")
        succeed(words(demo_folder, run, steps=1))
        assert [line["step"] for line in metrics(run)] == [1]


ODD = [b"\0" * 40, b"\xff\xfe{}", b"[1, 2]", b"5", b'{"kind": "train", "step": "3"}', b"{" * 5000, b'{"kind": "tr']


def test_odd_lines_of_records_are_set_aside(run: Path, demo_folder: Path, whole: list[float]) -> None:
    records = [run / "metrics.jsonl", run / "bad_samples.jsonl", run / "media" / "frames.jsonl"]
    (run / "bad_samples.jsonl").touch()
    for record in records:
        lines = record.read_bytes().splitlines()
        lines[1:1] = ODD[:4]
        record.write_bytes(b"\n".join([*lines, *ODD[4:]]))
    said = succeed(words(demo_folder, run))
    assert losses(run) == whole
    for record in records:
        assert len([line for line in warnings(said) if str(record) in line]) == 1
        assert record.with_name(f"{record.name}.odd").read_bytes() == b"".join(line + b"\n" for line in ODD)
        assert all(isinstance(json.loads(line), dict) for line in record.read_text().splitlines())
    assert not any("jsonl" in line for line in warnings(succeed(words(demo_folder, run))))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with class names, and a scored run on it."""
    folder = tmp_path_factory.mktemp("labelled")
    write_demo_data(folder, DemoConfig(train=24, val=8, test=0))
    succeed(finetune(folder))
    return folder


def finetune(folder: Path, *, steps: int = 2) -> list[str]:
    arguments = [
        "finetune",
        "demo_ft",
        "--data.train-list",
        str(folder / "train.csv"),
        "--out",
        str(folder / "run"),
    ]
    arguments += ["--data.val-list", str(folder / "val.csv"), "--data.num-workers", "0", "--precision", "fp32"]
    arguments += ["--batch.global-size", "8", "--batch.micro-size", "8", "--run.log-every-steps", "1", *SMALL]
    return [*arguments, "--run.save-every-steps", "1", "--run.max-steps", str(steps)]


@pytest.fixture
def changed(labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same data in another place, which is no change; the paths in the configuration are updated."""
    folder = tmp_path / "data"
    shutil.copytree(labelled, folder, symlinks=True)
    for copy in folder.glob("run/**/config.json"):
        copy.write_text(copy.read_text().replace(str(labelled), str(folder)))
    for checkpoint in folder.glob("run/checkpoints/step-*"):
        seal = json.loads((checkpoint / "complete.json").read_text())
        del seal["files"]["config.json"]
        (checkpoint / "complete.json").write_text(json.dumps(seal))
    return folder


def test_run_whose_data_stayed_says_nothing(changed: Path) -> None:
    assert warnings(succeed(finetune(changed, steps=3))) == []


def test_classes_in_another_order_are_refused_and_can_be_accepted(changed: Path) -> None:
    names = (changed / "classes.txt").read_text().split()
    for other in ([*names[:2], *reversed(names[2:])], [*names[:-1], "else"]):
        (changed / "classes.txt").write_text("\n".join(other) + "\n")
        before = contents(changed)
        place = next(i for i in range(len(names)) if names[i] != other[i])
        said = refuse(finetune(changed, steps=3))
        assert f"class {place} was {names[place]!r} and is now {other[place]!r}" in said
        assert f"remove {changed / 'run' / 'classes.txt'}" in said
        assert contents(changed) == before
    (changed / "run" / "classes.txt").unlink()
    succeed(finetune(changed, steps=3))
    assert (changed / "run" / "classes.txt").read_text().split() == other


def shorten_list(folder: Path) -> str:
    lines = (folder / "val.csv").read_text().splitlines()
    (folder / "val.csv").write_text("\n".join(lines[:-1]) + "\n")
    return "the validation list changed (8 videos, "


def reorder_videos(folder: Path) -> str:
    first, second = sorted((folder / "val").glob("*.mp4"))[:2]
    first.rename(folder / "val" / "x")
    second.rename(first)
    (folder / "val" / "x").rename(second)
    return "validation videos of the same names: 2 of 8 sampled videos have other content now"


@pytest.mark.parametrize("change", [shorten_list, reorder_videos])
def test_best_score_of_another_validation_does_not_carry_over(change: Callable[[Path], str], changed: Path) -> None:
    expected = change(changed)
    state = json.loads((changed / "run" / "checkpoints" / OLDEST / "state.json").read_text())
    said = warnings(succeed(finetune(changed, steps=3)))
    assert len(said) == 1
    assert expected in said[0]
    assert f"of step {state['best_step']}, no longer counts" in said[0]
    assert metrics(changed / "run", "val")[-1]["best_step"] == 3
    assert warnings(succeed(finetune(changed, steps=4))) == []


def test_training_videos_of_other_contents_are_reported_and_missing_ones_are_not(changed: Path) -> None:
    videos = sorted((changed / "train").rglob("*.mp4"))
    for video in videos[1:]:
        shutil.copy(videos[0], video)
    said = warnings(succeed(finetune(changed, steps=3)))
    assert len(said) == 1
    assert "training videos of the same names: " in said[0]
    assert "of 16 sampled videos have other content now" in said[0]
    assert warnings(succeed(finetune(changed, steps=4))) == []


def test_run_without_notes_on_its_data_resumes_in_silence(changed: Path) -> None:
    """As saved by older versions; a change of the list cannot be detected."""
    for checkpoint in (changed / "run" / "checkpoints").glob("step-*"):
        state = json.loads((checkpoint / "state.json").read_text())
        for name in ("contents", "val_videos", "val_contents"):
            assert state.pop(name)
        (checkpoint / "state.json").write_text(json.dumps(state))
        seal = json.loads((checkpoint / "complete.json").read_text())
        del seal["files"]["state.json"]
        seal["files"]["state.json"] = record_of(checkpoint / "state.json")
        (checkpoint / "complete.json").write_text(json.dumps(seal))
    shorten_list(changed)
    assert warnings(succeed(finetune(changed, steps=3))) == []


def record_of(path: Path) -> dict[str, int | str]:
    from everest_ds.files import sha256

    return {"size": path.stat().st_size, "sha256": sha256(path)}
