"""The sweep over sharding configurations: its commands, and the results from their output; processes are fakes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from everest_ds import cli
from everest_ds.benchmark.steps import sharding_sweep

WORDS = ["benchmark", "step", "demo", "--sweep-stages", "--gpus", "2", "--micro-batch", "1", "3", "4"]


def line(size: int, clips_per_s: float | None) -> dict[str, Any]:
    """Return a result line of two processes; without a speed, they ran out of memory."""
    fields = {"benchmark": "step", "gpus": 2, "micro_batch": size, "out_of_memory": clips_per_s is None}
    fields |= {"device": "a GPU", "device_memory_gib": 80.0, "memory_gib": None, "environment": {"commit": None}}
    return fields | {"clips_per_s": clips_per_s, "step_ms_median": 1.0, "peak_allocated_gib": 1.0}


PRINTED = {
    "zero1": (0, [line(1, 5.0), line(3, 9.0), line(4, 6.0)], ""),
    "zero2": (1, [line(1, 7.0), line(3, None)], "the other process"),
    "zero3": (2, [], "warning\neverest: error: no such thing\n"),
}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    seen: list[Sequence[str]] = []

    def run(command: Sequence[str], gpus: int) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        code, lines, stderr = PRINTED[Path(command[command.index("--ds-config") + 1]).stem]
        stdout = "".join(json.dumps(found) + "\n" for found in lines)
        return subprocess.CompletedProcess(command, code, f"some noise\n{stdout}", stderr)

    monkeypatch.setattr(sharding_sweep, "_run", run)
    return seen


def test_fastest_that_makes_up_the_global_batch_is_recommended_and_faults_are_named(
    commands: list[Sequence[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "stages.json"
    assert cli.main([*WORDS, "--out", str(out)]) == 1
    document = json.loads(out.read_text())
    assert [(row["ds_config"], row["micro_batch"]) for row in document["rows"]] == [
        ("zero1", 1), ("zero1", 3), ("zero1", 4), ("zero2", 1), ("zero2", 3),
    ]  # fmt: skip
    best = document["recommended"]  # 32 is not divisible by 2 x 3 clips
    assert (best["ds_config"], best["micro_batch"]) == ("zero2", 1)
    assert document["faults"] == {"zero3": "no such thing"}
    assert (document["gpus"], document["config"]["recipe"]) == (2, "demo")
    said = capsys.readouterr().out
    assert "zero2          micro-batch     3: out of memory" in said
    assert "zero3          failed: no such thing" in said
    assert f"fastest: zero2, micro-batch 1; written to {out}" in said
    for command in commands:
        assert "torch.distributed.run" in command
        assert list(command[-4:]) == ["--micro-batch", "1", "3", "4"]


def test_json_is_what_the_file_holds(
    commands: list[Sequence[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stages.json"
    assert cli.main([*WORDS, "--stages", "zero1", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())


def test_nothing_is_written_where_no_stage_could_be_measured(
    commands: list[Sequence[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*WORDS, "--stages", "zero3", "--out", str(tmp_path / "x.json")]) == 2
    assert "no stage could be measured: zero3: no such thing" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
