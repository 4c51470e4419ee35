"""Stored records of runs, read back: states, odd lines, curves, and records of any size."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everest_ds.errors import UserError
from everest_ds.pictures.report.page import draw_page
from everest_ds.recipes import find_config
from everest_ds.train.checkpoints.owner import OWNER, Owner
from everest_ds.train.record.stored.evaluations import read_evaluations
from everest_ds.train.record.stored.measurements import Measurements
from everest_ds.train.record.stored.run import is_run, read_run
from tests.conftest import GOLDEN

START = {"kind": "event", "step": 0, "event": "start", "world_size": 1, "zero_stage": 2}


def train(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "time_s": 1.7e9 + step, "epoch": step / 4, "loss": 1 / step, **values}


def event(step: int, name: str, **values: Any) -> dict[str, Any]:
    return {"kind": "event", "step": step, "time_s": 1.7e9 + step, "event": name, **values}


def make_run(folder: Path, *lines: dict[str, Any] | bytes, epochs: int = 10) -> Path:
    config = find_config("demo")
    config = replace(config, optim=replace(config.optim, epochs=epochs, warmup_epochs=0))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    (folder / "metrics.jsonl").write_bytes(b"".join(texts))
    return folder


@pytest.mark.parametrize(
    ("lines", "state", "said"),
    [
        ([START, train(40), event(40, "end")], "finished", "after step 40"),
        ([START, train(40)], "finished", "after step 40"),  # as in versions that recorded no end
        ([START, train(8), event(9, "stopped", signal="SIGTERM")], "stopped", "by SIGTERM after step 9"),
        ([START, train(8), event(8, "hang", ranks=[1], why="behind")], "hung", "after step 8: behind"),
        ([START, train(8), event(8, "weights_differ", ranks=[1])], "broken off", "weights of ranks 1 differ"),
        ([START, train(8)], "broken off", "no end is recorded after step 8 of 40: it failed or was killed"),
        ([START, train(8), event(8, "end"), event(8, "resume"), train(9)], "broken off", "after step 9 of 40"),
        ([START, train(8), event(8, "hang"), event(8, "resume"), train(40), event(40, "end")], "finished", "40"),
        ([START], "empty", "no step is recorded"),
        ([], "empty", "no step is recorded"),
    ],
)
def test_state_of_a_run_is_said(lines: list[dict[str, Any]], state: str, said: str, tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", *lines))
    assert run.state == state
    assert said in run.facts["state"]


def test_run_that_is_being_trained_says_so(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", START, train(8))
    me = Owner.of_this_process()
    (path / OWNER).write_text(json.dumps(asdict(me)))
    assert read_run(path).state == "training"
    assert f"pid {os.getpid()} on {me.host}" in read_run(path).facts["state"]
    (path / OWNER).write_text(json.dumps(asdict(replace(me, started="0"))))  # the process id was reused
    assert read_run(path).state == "broken off"
    elsewhere = replace(me, boot="another machine")
    (path / OWNER).write_text(json.dumps(asdict(elsewhere)))
    assert read_run(path).state == "training"
    os.utime(path / OWNER, (1e9, 1e9))  # its heartbeat has stopped
    assert read_run(path).state == "broken off"
    (path / OWNER).write_bytes(b"[" * 10**5)
    assert read_run(path).state == "broken off"


ODD = [
    b"\xff\xfe\n", b"[1]\n", b"[" * 10**5 + b"\n", b'{"kind": 3, "step": 1}\n', 
    b'{"kind": "train", "step": true}\n',
    b'{"kind": "train", "step": 1' + b"0" * 400 + b"}\n", b'{"kind": "train"}\n', b"null\n",
]  # fmt: skip


def test_odd_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    numbers = b'{"kind": "train", "step": 3, "loss": NaN, "lr": 1e999, "clips_per_s": ' + b"9" * 400 + b"}\n"
    strange = event(4, "x", ranks={"a": [[[[[[[[1]]]]]]]]}) | {"event": ["start"], "time_s": "soon"}
    path = make_run(tmp_path / "run", START, train(2), *ODD, b"\n", numbers, strange, b'{"kind": "tra')
    run = read_run(path)
    assert [f"{len(ODD)} lines of metrics.jsonl" in note for note in run.notes] == [True]  # not the incomplete one
    assert set(run.curves) == {"loss"}
    assert run.curves["loss"].steps_P.tolist() == [2]
    assert "not finite last" in run.facts["loss"]
    draw_page([run], written="now")


@pytest.mark.parametrize(
    "name", ["start", "resume", "stopped", "hang", "skipped_step", "slow_rank", "memory", "cuda_graph"]
)
@pytest.mark.parametrize("value", [None, 7, "x", [1], {"a": {"b": 1}}, -1e300])
def test_events_with_any_values_make_a_page(name: str, value: Any, tmp_path: Path) -> None:
    fields = (
        "signal",
        "ranks",
        "why",
        "samples",
        "rank",
        "own_ms",
        "peers_ms",
        "peak_gib",
        "estimated_gib",
        "device",
    )
    odd = event(5, name, **dict.fromkeys(fields, value)) | {"time_s": value}
    page = draw_page([read_run(make_run(tmp_path / "run", START, train(4), odd))], written="now")
    assert page.endswith("</html>\n")


def test_curves_take_the_last_line_of_a_step_in_order(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", train(2), train(6), train(4), train(2, loss=9.0), train(8, loss=None))
    curve = Measurements(path).curve("loss")
    assert curve is not None
    assert curve.steps_P.tolist() == [2, 4, 6]
    assert curve.values_P.tolist() == pytest.approx([9.0, 1 / 4, 1 / 6])


def test_many_lines_and_events_make_a_small_page(tmp_path: Path) -> None:
    lines = [train(step, lr=0.1, clips_per_s=float(step % 7)) for step in range(1, 20_001)]
    skipped = [event(step, "skipped_step", num_skipped=step, samples={"rank_0": ["v"] * 50}) for step in range(900)]
    run = read_run(make_run(tmp_path / "run", START, *lines, *skipped))
    page = draw_page([run], written="now")
    assert len(page) < 400_000
    assert len(run.events) < 50
    assert run.events[-1][2] == "876 more events of these kinds"
    assert run.facts["skipped steps"] == "900"
    loss = np.array(run.curves["loss"].values_P)
    assert loss.shape == (20_000,)


def test_slow_ranks_bad_draws_and_hangs_are_described(tmp_path: Path) -> None:
    slow = [event(50, "slow_rank", rank=3, own_ms=own, peers_ms=100.0) for own in (120.0, 250.0)]
    memory = event(60, "memory", device="cuda", peak_gib=66.0, estimated_gib=60.0)
    path = make_run(tmp_path / "run", START, train(50), *slow, memory)
    bad = [{"path": "a\udcff.mp4", "reason": "cut off", "epoch": 1, "index": 2}] * 3 + [
        {"path": "b", "reason": None}
    ]
    (path / "bad_samples.jsonl").write_text("\n".join(map(json.dumps, bad)) + "\nodd\n")
    folder = path / "hangs" / "20260101-000000"
    folder.mkdir(parents=True)
    (folder / "report.txt").write_bytes(b"rank 1 \xff\n" * 2000)
    run = read_run(path)
    assert any("rank 3 was slow 2 times, at worst 2.50 times its peers" in text for _, _, text in run.events)
    assert run.speed["measured against planned"] == "+10.0%"
    assert run.bad.count == 4
    assert run.bad.reasons[0] == ("cut off", 3)
    assert "a\\udcff.mp4" in draw_page([run], written="now")
    assert run.hangs[0][1].startswith("rank 1 \\xff\nrank 1")
    assert len(run.hangs[0][1]) < 10_000


def test_newest_pictures_are_found(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", START)
    for name in (
        "clip-1/step-00000020.png",
        "clip-1/step-00000100.png",
        "clip-1/note.txt",
        "kept-by-step/step-1.png",
        "x/y",
    ):
        (path / "media" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "media" / name).touch()
    found = [(picture.path.name, picture.caption) for picture in read_run(path).pictures]
    assert found == [
        ("step-00000100.png", "clip-1, step 100"), ("step-1.png", "tokens kept by time step, step 1")
    ]  # fmt: skip


def test_lost_settings_are_noted_and_taken_from_a_checkpoint_where_there_is_one(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", START, train(8))
    (path / "config.json").write_text("{")
    run = read_run(path)
    assert run.settings == {}
    assert any("no settings: " in note for note in run.notes)
    (path / "metrics.jsonl").unlink()
    assert not is_run(path)
    with pytest.raises(UserError, match="is not a run"):
        read_run(path)


def test_run_of_an_older_version_is_read() -> None:
    run = read_run(GOLDEN / "run_of_0_1")
    assert run.state == "finished"
    assert len(run.curves["loss"].steps_P) == 6
    assert run.settings["optim.base_lr"]


@pytest.mark.parametrize(
    "confusion", [None, "x", [[1, 2], [3]], [[1, -1], [0, 1]], [[1, 2.5], [0, 1]], [], [[True, 1], [1, 1]]]
)
def test_evaluations_with_odd_counts_have_scores_alone(confusion: Any, tmp_path: Path) -> None:
    parts: dict[str, Any] = {name: {} for name in ("protocol", "checkpoint", "list", "views")}
    shared = {"confusion": confusion, "classes": "abc", "unreadable": [1]}
    for name, top1 in ("good", 0.5), ("bad", "high"), ("worse", None), ("bare", ...):
        (tmp_path / f"evaluation-{name}").mkdir()
        (tmp_path / f"evaluation-{name}" / "summary.json").write_text(
            json.dumps(parts | ({} if top1 is ... else {"top1": top1}) | shared)
        )
    scores, faults = read_evaluations(tmp_path)
    assert [one.facts["top-1"] for one in scores] == ["50.00%"]
    assert scores[0].confusion is None
    assert len(faults) == 3


def test_pipes_and_folders_in_place_of_files_hold_nothing_up(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", train(8))
    (path / "config.json").unlink()
    (path / "bad_samples.jsonl").mkdir()
    for name in (
        "config.json",
        "environment.json",
        "media/clip-1/step-1.png",
        "hangs/x/report.txt",
        "evaluation-a/summary.json",
    ):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path / name)
    run = read_run(path, read_evaluations(path)[0])
    assert (run.settings, run.environment, run.pictures, run.hangs, run.scores) == ({}, {}, [], [], [])
    assert run.bad.count == 0
    draw_page([run], written="now")
