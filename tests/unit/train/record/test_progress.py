from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from everest_ds.recipes import get_recipe
from everest_ds.train.record import progress
from everest_ds.train.record.progress import StallHint, Window


def test_line_says_which_share_of_the_time_was_spent_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps took 8 s, 3 s of which were waiting: 1.5 s of 4 s per step."""
    clock = iter([100.0, 108.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    window = Window(torch.device("cpu"))
    window.steps, window.data_wait_s = 2, 3.0
    config = get_recipe("demo")
    values = window.measure(2, 1e9, config.batch.global_size)
    assert (values["step_ms"], values["data_wait_ms"], values["stalled"]) == (4000.0, 1500.0, 0.375)
    assert values["clips_per_s"] == config.batch.global_size / 4


def test_stall_is_told_of_when_it_begins_and_again_after_many_lines(capsys: pytest.CaptureFixture[str]) -> None:
    config = get_recipe("demo")
    hint = StallHint(replace(config, data=replace(config.data, reader="decord")))
    said = []
    for share in [0.9, 0.05, 0.1, 0.34] + [0.5] * 120:  # the first line includes the start of the workers
        hint.on_log(1, {"stalled": share})
        said.append(capsys.readouterr().out)
    assert [number for number, text in enumerate(said) if text] == [3, 54, 105]
    assert said[3].startswith("note: 34% of the time was spent waiting for clips. 1 loader processes")
    fields = ("data.num_workers", "data.reader=pyav (now decord)", "data.repeats (now 1)")
    for way_out in (*fields, "everest prepare", "everest benchmark data demo"):
        assert way_out in said[3]
    hint = StallHint(config)  # its reader is PyAV
    for _ in range(2):
        hint.on_log(1, {"stalled": 0.5})
    assert "data.reader" not in capsys.readouterr().out
