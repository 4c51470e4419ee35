from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.console import messages
from everest_ds.recipes import get_recipe
from everest_ds.train.record import view
from everest_ds.train.record.summary import describe_end
from everest_ds.train.record.view import ProgressBar, ProgressLines, describe_briefly, make_view
from everest_ds.train.schedule import Schedule
from everest_ds.train.step.updater import StepResult

VALUES: dict[str, Any] = {
    "epoch": 12.25, "loss": 0.51234, "grad_norm": 1.5, "lr": 1e-4, "clips_per_s": 123.4, "step_ms": 1000.0,
    "data_wait_ms": 30.0, "stalled": 0.03, "memory_gib": 12.34, "mfu": None,
}  # fmt: skip
SCHEDULE = Schedule(start_step=2, end_step=40, steps_per_epoch=4)
RESULT = StepResult(applied=torch.tensor(True), grad_norm=torch.tensor(1.0))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_pipe_gets_lines_the_first_after_one_step(capsys: pytest.CaptureFixture[str]) -> None:
    shown = make_view(SCHEDULE, 10)
    assert type(shown) is ProgressLines
    shown.on_start()
    for step in (3, 4):
        shown.on_step(step, [torch.tensor(1.0), torch.tensor(2.0)], RESULT)
    shown.on_log(10, VALUES)
    shown.close()
    first, line = capsys.readouterr().out.splitlines()
    assert first == "step 3/40  loss 1.5000  (first of this start; next line after step 10)"
    assert line.startswith("step 10/40  epoch 12.25  loss 0.5123  grad 1.5  lr 1.00e-04  123.4 clips/s")
    assert line.endswith("ETA 30s")


def test_first_step_is_not_reported_twice_where_every_step_is(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLines(SCHEDULE, 1).on_step(3, [torch.tensor(1.0)], RESULT)
    assert capsys.readouterr().out == ""


def test_terminal_gets_one_bar_with_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    shown = make_view(SCHEDULE, 10)
    assert type(shown) is ProgressBar
    shown.on_start()
    shown.on_step(3, [torch.tensor(1.0)], RESULT)
    shown.on_log(10, VALUES)
    messages.say("saved something")
    shown.on_end(40)
    messages.say("after the bar")
    drawn = terminal.getvalue()
    for words in ("2/40 waiting for the first clips", "3/40 loss 1.0000", describe_briefly(10, 40, VALUES)):
        assert words in drawn
    assert "\x1b[3" not in drawn  # no colour, regardless of NO_COLOR
    assert "saved something\n" in drawn
    assert drawn.endswith("after the bar\n")
    assert max(len(part.split("\r")[-1]) for part in drawn.replace("\x1b[A", "").split("\r")) <= 80


def test_quiet_terminal_gets_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    messages.set_verbosity(-1)
    try:
        shown = make_view(SCHEDULE, 10)
        shown.on_start()
        shown.on_step(3, [torch.tensor(1.0)], RESULT)
        shown.on_log(10, VALUES)
        messages.say("news")
        messages.say("warning: careful")
    finally:
        messages.set_verbosity(0)
    assert terminal.getvalue() == "warning: careful\n"


def test_numbers_beside_the_bar_fit_80_columns_in_the_longest_runs() -> None:
    most = VALUES | {"epoch": 999.9, "clips_per_s": 9999.0, "stalled": 1.0, "memory_gib": 139.9, "step_ms": 900.0}
    assert len("999999/999999" + describe_briefly(1, 999_999, most)) < 80  # leaves one character for the bar
    assert view.describe_briefly(39, 40, VALUES).endswith("ETA 1s")


def test_summary_takes_the_whole_record_and_names_the_next_command(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": 5, "loss": 2.0, "clips_per_s": 10.0, "stalled": 0.5, "mfu": None},
        {"kind": "train", "step": 10, "loss": 1.0, "clips_per_s": 20.0, "stalled": 0.1, "mfu": None},
        {"kind": "val", "step": 10, "top1": 0.75},
        {"kind": "train", "step": 15, "loss": 1.5, "clips_per_s": 30.0, "stalled": 0.2, "mfu": None},
        {"kind": "val", "step": 15, "top1": 0.5},
        {"kind": "event", "step": 15, "event": "memory", "device": "cpu", "peak_gib": 1.5, "estimated_gib": 0.01},
    ]
    run_dir = tmp_path / "a run"
    text = describe_end(run_dir, get_recipe("demo"), lines, seconds=75, num_bad=0)
    assert text.splitlines() == [
        f"done: {run_dir}",
        "  took    1m15s since this start",
        "  loss    2.0000 at step 5, 1.5000 at step 15, lowest 1.0000",
        "  speed   20.0 clips/s in the median, 20% of the time waiting for clips",
        "  top-1   75.00% at step 10 (best), 50.00% at the end",
        "  memory  1.50 GiB resident, with Python and its libraries; 0.01 GiB planned for tensors",
        "  videos  all readable",
        f"  next    everest finetune demo_ft --init-from '{run_dir}' --data.train-list LIST --data.val-list LIST",
    ]
    text = describe_end(run_dir, get_recipe("demo_ft"), [], seconds=1, num_bad=3)
    assert f"3 draws unreadable: {run_dir / 'bad_samples.jsonl'}" in text
    assert f"everest evaluate '{run_dir}'" in text
