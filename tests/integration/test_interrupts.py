"""Ctrl-C in every command, with real processes and launchers: one line, no traceback, nothing half-written."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import save_file

from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.sizes import get_size
from everest_ds.recipes import get_recipe
from everest_ds.train.tasks import encoder_options
from tests.conftest import REPOSITORY
from tests.integration.interrupting import Interrupted, interrupt, partial_files, wait_until
from tests.integration.launch import (
    RECOVERY_STEPS,
    compute,
    contents,
    cpu_environment,
    metrics,
    recovery_command,
    require_same_run,
    start,
)

NO_SAVES = ("--run.save-every-steps", "100", "--data.num-workers", "2")


def has_steps(run_dir: Path, count: int) -> Callable[[], bool]:
    return lambda: (run_dir / "metrics.jsonl").is_file() and len(metrics(run_dir)) >= count


def require_stopped(done: Interrupted, run_dir: Path) -> None:
    """Require that the run printed one sentence, saved where it stopped, and that nothing in the project failed."""
    (event,) = (event for event in metrics(run_dir, "event") if event["event"] == "stopped")
    assert event["signal"] == "SIGINT"
    sentence = (
        f"SIGINT: stopped after step {event['step']} of {RECOVERY_STEPS}, all saved; the same command resumes"
    )
    assert done.stdout.count("SIGINT: ") == 1
    assert sentence in done.stdout
    assert done.said == []
    assert "everest_ds/" not in done.stderr
    assert [path.name for path in sorted((run_dir / "checkpoints").glob("step-*"))] == [f"step-{event['step']:08d}"]


def test_interrupted_run_of_one_process_resumes_bitwise(demo_folder: Path, tmp_path: Path) -> None:
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    arguments = recovery_command(demo_folder, run_dir, *NO_SAVES)
    done = interrupt(arguments, has_steps(run_dir, 5))
    assert done.code == 75
    assert "Traceback" not in done.stderr
    require_stopped(done, run_dir)
    for out in (run_dir, whole):
        assert compute(recovery_command(demo_folder, out, "--run.save-every-steps", "100")).returncode == 0
    require_same_run(run_dir, whole)


@pytest.mark.parametrize(
    ("command", "code"), [("pretrain", 75), pytest.param("check-data", 130, marks=pytest.mark.slow)]
)
def test_interrupt_that_ends_the_reader_of_the_output_too_changes_nothing(
    command: str, code: int, demo_folder: Path, tmp_path: Path
) -> None:
    """In `everest ... 2>&1 | tee log`, Ctrl-C also ends tee; the run still saves."""
    out = tmp_path / "out"
    words: dict[str, list[str | Path]] = {
        "pretrain": [*recovery_command(demo_folder, out, *NO_SAVES)],
        "check-data": ["check-data", demo_folder / "train.csv", "--out", out],
    }
    record = {"pretrain": "metrics.jsonl", "check-data": "findings.jsonl"}[command]
    with start(words[command], own_group=True, one_pipe=True) as process:
        assert process.stdout is not None
        wait_until(lambda: (out / record).is_file() and (out / record).read_text().count("\n") > 3, process)
        process.stdout.close()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == code
    if command == "pretrain":
        assert list((out / "checkpoints").glob("step-*/complete.json"))


@pytest.mark.parametrize(
    ("launcher", "code", "last"),
    [
        # The launchers' own answers to Ctrl-C, as of DeepSpeed 0.19.8 and torch 2.14.
        ("deepspeed", -signal.SIGINT, "KeyboardInterrupt"),
        pytest.param(
            "torchrun", 1, "SignalException: Process [0-9]+ got signal: 2", marks=pytest.mark.slow, id="torchrun"
        ),
    ],
)
def test_interrupted_launch_resumes_bitwise(
    launcher: str, code: int, last: str, uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = recovery_command(demo_folder, run_dir, *NO_SAVES)
    done = interrupt(arguments, has_steps(run_dir, 5), processes=2, launcher=launcher)
    assert done.code == code
    assert done.stderr.count("Traceback") == 1
    assert re.search(f"{last}$", done.stderr.rstrip())
    require_stopped(done, run_dir)
    assert compute([*arguments, "--data.num-workers", "0"], processes=2).returncode == 0
    require_same_run(run_dir, uninterrupted[2])


@pytest.mark.slow
def test_interrupt_of_one_rank_stops_all_with_the_exit_code_of_the_run(demo_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def send(process: subprocess.Popen[str]) -> None:
        members = psutil.Process(process.pid).children(recursive=True)
        rank = next(member for member in members if member.environ().get("RANK") == "1")
        rank.send_signal(signal.SIGINT)

    arguments = recovery_command(demo_folder, run_dir, *NO_SAVES)
    done = interrupt(arguments, has_steps(run_dir, 5), processes=2, send=send)
    assert done.code == 75
    assert "Traceback" not in done.stderr
    require_stopped(done, run_dir)


@pytest.mark.slow
def test_launch_script_ends_with_the_exit_code_of_the_run_and_no_traceback(
    uninterrupted: dict[int, Path], demo_folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = recovery_command(demo_folder, run_dir, *NO_SAVES)
    task, recipe, _, train_list, _, out, *flags = words
    assert (task, recipe, out) == ("pretrain", "demo", str(run_dir))
    script = ["bash", "launch/pretrain.sh", recipe, train_list, out, "--batch.micro-size", "16", *flags]
    environment = cpu_environment(DS_ACCELERATOR="cpu", LOCAL_SIZE="2")
    environment["PATH"] = f"{launcher_of_two(tmp_path)}:{environment['PATH']}"
    with subprocess.Popen(
        script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY,
        start_new_session=True,
    ) as process:  # fmt: skip
        wait_until(has_steps(run_dir, 5), process)
        psutil.Process(process.pid).send_signal(signal.SIGINT)  # alone in its group
        stdout, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr
    assert process.returncode == 75
    require_stopped(Interrupted(process.returncode, stdout, stderr), run_dir)
    assert compute(words, processes=2).returncode == 0
    require_same_run(run_dir, uninterrupted[2])


def launcher_of_two(folder: Path) -> Path:
    """A folder with a `deepspeed` that starts two processes, as on a machine with two GPUs."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "deepspeed").write_text(f'#!/bin/bash\nexec {shutil.which("deepspeed")} --num_gpus 2 "$@"\n')
    (tools / "deepspeed").chmod(0o755)
    return tools


@pytest.mark.parametrize("after_s", [0.4, 3.0])
def test_interrupt_before_the_first_step_says_so_and_the_same_command_starts(
    after_s: float, demo_folder: Path, tmp_path: Path
) -> None:
    """While modules are imported, and later while DeepSpeed is set up or the loader starts."""
    run_dir = tmp_path / "run"
    arguments = recovery_command(demo_folder, run_dir, *NO_SAVES, "--run.max-steps", "1")
    done = interrupt(arguments, after_s)
    assert (done.code, done.said) == (
        130,
        [
            "everest: interrupted before the first step, nothing was trained; the same command starts again "
            "(exit code 130)"
        ],
    )
    assert "Traceback" not in done.stderr
    assert partial_files(tmp_path) == []
    assert compute([*arguments, "--data.num-workers", "0"]).returncode == 0


def test_interrupted_demo_data_does_not_look_finished_and_is_completed(tmp_path: Path) -> None:
    words = ["demo-data", "--train", "60", "--val", "8", "--test", "0"]
    folder, whole = tmp_path / "interrupted", tmp_path / "whole"
    done = interrupt([*words, folder], lambda: (folder / "train" / "00020.mp4").is_file())
    require_one_line(done, "interrupted; the same command continues where it stopped")
    assert not list(folder.glob("*.csv"))
    assert not (folder / "demo.json").exists()
    assert partial_files(folder) == []
    videos = len(list(folder.rglob("*.mp4")))
    assert 20 < videos < 68
    earliest = (folder / "train" / "00000.mp4").stat().st_mtime_ns
    for path in (folder, whole):
        assert compute([*words, path]).returncode == 0
    assert contents(folder) == contents(whole)
    assert (folder / "train" / "00000.mp4").stat().st_mtime_ns == earliest


def require_one_line(done: Interrupted, line: str) -> None:
    assert done.code == 130
    said = [one for one in done.stderr.splitlines() if not one.startswith("loading torch")]
    assert said == [f"everest: {line} (exit code 130)"]
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("command", "journal"),
    [
        pytest.param("check-data", "findings.jsonl", marks=pytest.mark.slow),
        ("prepare", "manifest.jsonl"),
    ],
)
def test_interrupted_work_on_a_list_continues(
    command: str, journal: str, demo_folder: Path, tmp_path: Path
) -> None:
    """Its processes end with it, finished work is not repeated, and no partial file is left."""
    out = tmp_path / "out"
    words = [command, demo_folder / "train.csv", "--out", out, "--processes", "2"]
    done = interrupt(words, lambda: (out / journal).is_file() and (out / journal).read_text().count("\n") > 10)
    require_one_line(done, "interrupted; the same command continues where it stopped")
    known = (out / journal).read_text().count("\n") - 1
    assert 10 <= known < 128
    assert partial_files(out) == []
    assert not list(out.glob("*.csv"))
    again = compute(words)
    assert again.returncode == 0, again.stderr
    assert f"{known} of 128 " in again.stdout
    assert (out / journal).read_text().count("\n") == 129


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of the demo's size."""
    config = get_recipe("demo_ft")
    model = EverestClassifier(
        get_size(config.model.size), config.position_grid, encoder_options(config), num_classes=8
    )
    path = tmp_path_factory.mktemp("weights") / "demo.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_interrupted_scoring_says_one_line_and_writes_nothing(
    command: str, processes: int, weights: Path, demo_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    many = tmp_path / "many.csv"
    rows = (demo_folder / "train.csv").read_text().splitlines()
    many.write_text("".join(f'"{demo_folder / row.rsplit(" ", 1)[0]}" 0\n' for row in rows * 20))
    if command == "evaluate":
        words = ["evaluate", weights, "--list", many, "--out", out]
    else:
        words = ["predict", weights, demo_folder / "train", "--features", out / "features.safetensors"]
        words += ["--num-temporal", "40"]
    words += ["--recipe", "demo_ft", "--batch-rows", "1", "--num-workers", "1"]

    def is_scoring() -> bool:
        """Whether the fork server of every rank has started a loader process."""
        try:
            members = psutil.Process().children(recursive=True)
            return sum("forkserver" in " ".join(member.cmdline()) for member in members) >= 2 * processes
        except psutil.Error:  # one has just ended
            return False

    done = interrupt(words, is_scoring, processes=processes)
    line = "everest: interrupted; the same command starts again (exit code 130)"
    assert done.said == [line]
    assert done.stderr.count("Traceback") == processes - 1  # the launcher's own
    assert "everest_ds/" not in done.stderr
    assert not out.exists() or list(out.iterdir()) == []


@pytest.mark.slow
def test_interrupted_study_stops_its_runs_and_continues(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    words = ["study", folder, "--quick", "--only", "baseline", "--jobs", "1"]
    run_dir = folder / "runs" / "baseline-0" / "pretrain"
    done = interrupt(words, has_steps(run_dir, 1))
    require_one_line(done, "interrupted, its runs are stopped; the same command continues where it stopped")
    assert [event["event"] for event in metrics(run_dir, "event")].count("stopped") == 1
    assert partial_files(folder) == []
    resumed = interrupt(words, lambda: any(e["event"] == "resume" for e in metrics(run_dir, "event")))
    assert resumed.code == 130


def test_command_line_of_the_package_is_the_console_script() -> None:
    """Both start with the same function, which handles Ctrl-C before anything heavy is imported."""
    code = "import everest_ds.cli, sys; print(len([name for name in sys.modules if name.startswith('everest_ds')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 3
