"""The rows of `launch/measure_gpu.sh`: each row runs in its own process, is stored, and is not run again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from everest_ds.benchmark import gpu_table
from everest_ds.benchmark.gpu_table import ROWS, TableRow, command_of, main, measure
from tests.conftest import REPOSITORY

MEASURED = '{"micro_batch": 32, "clips_per_s": 213.0, "step_ms_median": 148.9, "mfu": 0.091, "aten_calls": 28400}'


def programs(monkeypatch: pytest.MonkeyPatch, programs_of: dict[str, str]) -> list[str]:
    """Replace the rows' commands by Python programs; return a list that collects the names of started rows."""
    ran: list[str] = []

    def command(row: TableRow, *, small: bool) -> list[str]:
        return [sys.executable, "-c", programs_of[row.name]]

    def noted(row: TableRow, limit_s: float, *, small: bool) -> dict[str, object]:
        ran.append(row.name)
        return measure(row, limit_s, small=small)

    monkeypatch.setattr(gpu_table, "ROWS", tuple(TableRow(name, "recipe", "", 30) for name in programs_of))
    monkeypatch.setattr(gpu_table, "command_of", command)
    monkeypatch.setattr(gpu_table, "measure", noted)
    return ran


def test_a_row_that_fails_is_recorded_the_others_go_on_and_done_ones_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, fails = tmp_path / "table.json", "import sys; sys.exit('out of memory, it says')"
    ran = programs(
        monkeypatch, {"one": f"print('heading'); print('{MEASURED}')", "two": fails, "three": "print('{}')"}
    )
    assert main(["1", "--out", str(out)]) == 1
    record = json.loads(out.read_text())
    assert ran == list(record) == ["one", "two", "three"]
    assert [row["returncode"] for row in record.values()] == [0, 1, 0]
    assert record["one"]["lines"] == [json.loads(MEASURED)]
    assert record["two"]["says"] == "out of memory, it says"
    assert "| one | 32 | 213.0 | 148.9 | 9.1% | - | 28400 | - |" in out.with_suffix(".md").read_text().splitlines()
    ran.clear()
    assert main(["1", "--out", str(out)]) == 1
    assert ran == ["two"]
    assert "out of memory, it says" in capsys.readouterr().out


def test_a_row_ends_at_its_limit_with_all_that_it_started_and_the_time_as_a_whole_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    child = "import subprocess; child = subprocess.Popen(['sleep', '99']); "
    child += f"open('{pid_file}', 'w').write(str(child.pid)); child.wait()"
    ran = programs(monkeypatch, {"slow": child, "next": "print('{}')"})
    record = measure(TableRow("slow", "recipe", "", 2), 2.0, small=False)
    assert (record["returncode"], record["says"]) == (None, "stopped after 2 s")
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(pid_file.read_text())).wait(timeout=10)
    ran.clear()
    assert main(["0.001", "--out", str(tmp_path / "table.json")]) == 0
    assert ran == []


def test_rows_name_settings_that_exist_and_go_from_the_paths_of_now_to_those_before() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert names[:3] == ["gpu tests", "ViT-L now", "ViT-L before"]
    assert {size for row in ROWS if row.name.startswith("ViT-L now") for size in row.sizes} == {32, 64, 128, 256}
    assert command_of(ROWS[0], small=False)[-3:] == ["tests", "-m", "gpu"]


def test_script_measures_a_toy_on_a_cpu_and_goes_on_from_a_checkout_alone(tmp_path: Path) -> None:
    """The script runs one row that works on a CPU and one whose attention needs a GPU."""
    out, names = tmp_path / "table.json", ["ViT-L flat, eager", "ViT-L before"]
    script = ["bash", "launch/measure_gpu.sh", "5", "--small", "--out", str(out), "--only", *names]
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            script, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    done = run()
    assert done.returncode == 1, done.stderr
    record = json.loads(out.read_text())
    assert record["ViT-L flat, eager"]["returncode"] == 0
    assert [line["micro_batch"] for line in record["ViT-L flat, eager"]["lines"]] == [1, 2]
    assert record["ViT-L flat, eager"]["lines"][0]["gradients"] == "flat"
    assert "model.attention=varlen is not available: it needs a CUDA device" in record["ViT-L before"]["says"]
    again = run()
    assert "ViT-L flat, eager ..." not in again.stdout
    assert "ViT-L before ..." in again.stdout


def test_output_that_is_no_line_of_figures_is_passed_over() -> None:
    assert list(gpu_table.lines_of(f"{{'loss': 1.0}}\n{MEASURED}\n{{\"clips_per_s\": 1")) == [json.loads(MEASURED)]


def test_figures_of_a_toy_are_not_those_of_the_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "table.json"
    out.write_text(json.dumps({ROWS[1].name: {"command": "another", "returncode": 0, "lines": [], "says": ""}}))
    asked: list[str] = []

    def measured(row: TableRow, limit_s: float, *, small: bool) -> dict[str, object]:
        asked.append(row.name)
        return {"command": gpu_table.shown(command_of(row, small=small)), "returncode": 0, "lines": [], "says": ""}

    monkeypatch.setattr(gpu_table, "measure", measured)
    for small in (["--small"], [], []):
        assert main(["1", "--out", str(out), "--only", ROWS[1].name, *small]) == 0
    assert asked == [ROWS[1].name] * 2
