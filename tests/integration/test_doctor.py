"""`everest doctor`: every failing part gets a row and sets the exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from everest_ds import cli
from everest_ds.commands import doctor
from everest_ds.distributed import World
from tests.conftest import REPOSITORY


def rows_of(shown: str) -> dict[str, str]:
    """Part -> its whole line."""
    return {line[9:31].strip(): line for line in shown.splitlines() if line.startswith(("ok ", "-- ", "MISSING "))}


def test_doctor_finds_this_machine_ready(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capfd.readouterr().out
    rows = rows_of(shown)
    for part in ("torch", "deepspeed", "av", "attention sdpa", "reader pyav", "communication gloo"):
        assert rows[part].startswith("ok "), shown
    assert {"attention varlen", "reader decord", "reader torchcodec"} <= rows.keys()
    assert "auto; decoding H.264" in shown
    assert shown.endswith("ready to train\n")


def test_doctor_exits_with_1_when_something_required_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "no-such-package"))
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "MISSING  no-such-package" in shown
    assert "missing: no-such-package" in shown


def test_doctor_requires_pyav_and_no_other_reader(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = {"decord": "not installed; install it", "torchcodec": "does not import: no FFmpeg"}
    monkeypatch.setattr("everest_ds.data.readers.choice.obstacle", faults.get)
    assert cli.main(["doctor"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["reader decord"].startswith("-- ")
    assert rows["reader decord"].endswith(faults["decord"])
    assert rows["reader pyav"].startswith("ok ")
    assert "auto" in rows["reader pyav"]
    assert rows["reader torchcodec"].endswith("no FFmpeg")
    faults["pyav"] = "not installed; pip install av"
    assert cli.main(["doctor"]) == 1
    assert "missing: reader pyav" in capsys.readouterr().out


# Broken variants of a package, and the word for each in its row.
BROKEN = {
    "raises at import": ("raise RuntimeError('two\\nlines')", "does not import: RuntimeError: two lines"),
    "raises when it is used": ("def open(*given, **named): raise TypeError('no such option')", "no such option"),
    "crashes": ("import os; os.abort()", "crashes its process: SIGABRT"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_doctor_makes_a_row_of_a_broken_package(kind: str, tmp_path: Path) -> None:
    code, words = BROKEN[kind]
    (tmp_path / "av.py").write_text(code)
    ran = subprocess.run(
        [sys.executable, "-m", "everest_ds", "doctor"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert ran.returncode == 1, ran
    assert "Traceback" not in ran.stdout + ran.stderr
    rows = rows_of(ran.stdout)
    assert any(words in line for part, line in rows.items() if part in ("av", "reader pyav")), ran.stdout
    assert rows["torch"].startswith("ok ")
    assert rows["communication gloo"].startswith("ok ")
    assert "reader pyav" in ran.stdout.splitlines()[-1]


def survey(monkeypatch: pytest.MonkeyPatch, looks: dict[str, Callable[[], list[doctor.Row]]]) -> int:
    checks = [(doctor.OPTIONAL if name == "extra" else doctor.MISSING, name, look) for name, look in looks.items()]
    monkeypatch.setattr(doctor, "_checks", lambda: checks)
    return doctor.main([], World.from_environment())


def test_doctor_looks_at_the_rest_when_a_part_crashes_or_hangs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "TIMEOUT_S", 0.5)
    good: Callable[[], list[doctor.Row]] = lambda: [(doctor.OK, "good", "1.0")]  # noqa: E731
    looks: dict[str, Callable[[], list[doctor.Row]]] = {
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),  # type: ignore[dict-item, return-value]
        "good": good,
        "hanging": lambda: time.sleep(60),  # type: ignore[dict-item, return-value]
        "gone": lambda: os._exit(7),
        "leaving": lambda: sys.exit(3),
    }
    assert survey(monkeypatch, looks) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=2) for line in lines[:5]] == [
        ["MISSING", "killed", "crashes its process: SIGKILL"],
        ["ok", "good", "1.0"],
        ["MISSING", "hanging", "does not answer within 0 s"],
        ["MISSING", "gone", "ends its process with exit code 7"],
        ["MISSING", "leaving", "SystemExit: 3"],
    ]
    assert lines[-1] == "missing: killed, hanging, gone, leaving"


def test_doctor_does_not_require_an_optional_part_that_crashes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert survey(monkeypatch, {"extra": lambda: os._exit(1)}) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready to train"
