from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from everest_ds.distributed import World
from everest_ds.train.record.bad_samples import BadSamples
from everest_ds.train.record.lines import is_measurement, keep_lines
from everest_ds.train.record.metrics import (
    MetricsLog,
    peak_memory_gib,
    peak_tflops,
)


def test_lines_are_appended(tmp_path: Path) -> None:
    for step in (1, 2):
        log = MetricsLog(tmp_path, start_step=step - 1)
        log.write("train", step, loss=0.5 * step, mfu=None, note="words")
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"], line["loss"], line["mfu"]) for line in lines] == [
        ("train", 1, 0.5, None),
        ("train", 2, 1.0, None),
    ]


def test_steps_that_are_taken_again_are_not_recorded_twice(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write("train", step, loss=float(step))
    log.write("event", 5, event="checkpoint")
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # the process was killed here
    log = MetricsLog(tmp_path, start_step=3)
    log.write("train", 4, loss=40.0)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    assert train == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [line["event"] for line in lines if line["kind"] == "event"] == ["checkpoint"]


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write("train", 1, loss=float("nan"), grad_norm=float("inf"))
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["grad_norm"]) == (None, None)


def test_log_touches_the_disk_with_its_first_line_and_on_rank_zero_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for is_main in (True, False):
        log = MetricsLog(tmp_path / "run", is_main=is_main)
        log.close()
    log.write("train", 1, loss=1.0)
    log.say("nothing")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_cpu_has_memory_but_no_peak() -> None:
    cpu = torch.device("cpu")
    assert peak_tflops(cpu) is None
    assert 0.05 < peak_memory_gib(cpu) < 1000


def test_bad_samples_of_steps_that_are_taken_again_are_not_recorded_twice(tmp_path: Path) -> None:
    path, alone = tmp_path / "bad_samples.jsonl", World(rank=0, local_rank=0, size=1, local_size=1)
    resumed = BadSamples(tmp_path, alone, max_share=0.1, num_rows=40, global_size=8, count=2)
    resumed.on_start()  # a run without bad samples
    assert not path.exists()
    path.write_text('{"path": "1"}\n{"path": "2"}\n{"path": "3"}\n{"pat')
    resumed.on_start()
    assert path.read_text() == '{"path": "1"}\n{"path": "2"}\n'
    assert path.with_name("bad_samples.jsonl.odd").read_text() == '{"pat\n'


def test_folder_with_the_name_of_the_record_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "metrics.jsonl" / "mine").touch()
    log = MetricsLog(tmp_path)
    log.write("train", 1, loss=1.0)
    log.close()
    assert (tmp_path / "odd-metrics.jsonl" / "mine").is_file()
    assert (tmp_path / "metrics.jsonl").is_file()


def test_record_that_is_written_again_loses_no_odd_line_and_repeats_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    odd = [
        b"\0\0",
        b"\xff",
        b"[1]",
        b"null",
        b'{"kind": 1, "step": 1}',
        b'{"kind": "val", "step": 1.5}',
        b'{"step": 1}',
    ]
    whole = b'{"kind": "train", "step": 1}'
    path.write_bytes(b"\n".join([*odd[:4], b"", whole, *odd[4:], b'{"kind": "tr']))
    before = path.read_bytes()
    for _ in range(2):  # as if killed after the odd lines were set aside
        keep_lines(path, is_measurement, lambda number, line: True)
        assert path.read_bytes() == whole + b"\n"
        assert path.with_name("metrics.jsonl.odd").read_bytes().split(b"\n")[:-1] == [*odd, b'{"kind": "tr']
        path.write_bytes(before)
    assert capsys.readouterr().out.count("has 8 lines of another format") == 2
    path.write_bytes(whole)  # cut off before the line break
    keep_lines(path, is_measurement, lambda number, line: True)
    assert path.read_bytes() == whole + b"\n"
