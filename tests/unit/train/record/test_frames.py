from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.config import PretrainConfig, RunConfig
from everest_ds.data.clips.batch import ClipBatch
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.model.frames import FrameChoice
from everest_ds.recipes import get_recipe
from everest_ds.train.checkpoints.save import TrainState
from everest_ds.train.loop import Trainer
from everest_ds.train.record.frames import FrameLog, chooses_frames, describe_choice
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.schedule import Schedule
from everest_ds.train.step.updater import DeepSpeedUpdater
from tests.unit.train.test_loop import ALONE, CPU, DATASET_SIZE, FakeEngine, FakeTask, make_config

ROWS = [VideoRow(Path(f"{number}.mp4"), 0) for number in range(DATASET_SIZE)]
CANDIDATES = 24  # frames, in 12 steps, 8 of which are drawn


def with_alpha(config: PretrainConfig, alpha: float) -> PretrainConfig:
    return replace(config, selection=replace(config.selection, alpha=alpha))


def choice_of(number: int) -> FrameChoice:
    """Return a choice that differs between micro-batches; the second clip's must never be recorded."""
    counts = [(number + step) % 5 for step in range(12)]
    steps = sorted((number + step) % 12 for step in range(8))
    return FrameChoice(torch.tensor([steps, [0] * 8]), torch.tensor([counts, [99] * 12]))


class ChoosingTask(FakeTask):
    """A task with the frame choice of each micro-batch, numbered from 0."""

    frame_choice: FrameChoice | None = None

    def __init__(self) -> None:
        self.number = -1

    def inputs(self, batch: ClipBatch, device: torch.device) -> tuple[torch.Tensor]:
        self.number += 1
        self.frame_choice = choice_of(self.number)
        return super().inputs(batch, device)


def batches() -> Iterator[ClipBatch]:
    for number in range(10**6):
        empty = torch.zeros(0)
        frames_BT = torch.arange(CANDIDATES) * 2 + torch.tensor([[number], [1000]])
        index_B = torch.tensor([3 * number, 1]) % DATASET_SIZE
        yield ClipBatch(clips_BCTHW=empty, frames_BT=frames_BT, noise_BS=empty, label_B=empty, index_B=index_B)


def train(run_dir: Path, config: PretrainConfig, start_step: int = 0) -> None:
    log, task = MetricsLog(run_dir), ChoosingTask()
    engine = FakeEngine([1.0] * 100, config.batch.accumulation_steps(1), 0.25)
    trainer = Trainer(
        engine=engine,
        updater=DeepSpeedUpdater(engine, 0.0),
        task=task,  # type: ignore[arg-type]
        config=config,
        schedule=Schedule.of(config, DATASET_SIZE, start_step=start_step),
        world=ALONE,
        device=CPU,
        run_dir=run_dir,
        log=log,
        start=TrainState(world_size=1, zero_stage=2, dtype="float32", videos="40 videos, abc"),
        callbacks=[FrameLog(run_dir, ROWS, task)] if chooses_frames(config) else [],
    )
    try:
        trainer.run(batches())
    finally:
        log.close()


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "media" / "frames.jsonl").read_text().splitlines()]


def test_choice_is_described_in_frames_of_the_video() -> None:
    choice = FrameChoice(torch.tensor([[0, 2], [1, 2]]), torch.tensor([[6, 0, 2], [1, 1, 1]]))
    assert describe_choice([10, 14, 18, 22, 26, 30], choice) == {
        "candidate_frames": [10, 14, 18, 22, 26, 30],
        "counts": [6, 0, 2],
        "probabilities": [0.75, 0.0, 0.25],
        "steps": [0, 2],
        "frames": [10, 14, 26, 30],
    }
    with pytest.raises(ValueError, match=r"7 candidate frames do not make 3 time steps"):
        describe_choice(list(range(7)), choice)


def test_every_log_step_has_a_line_of_the_first_clip_of_its_last_micro_batch(tmp_path: Path) -> None:
    config = with_alpha(make_config(RunConfig(max_steps=5, log_every_steps=2), micro_size=4), 1.5)
    train(tmp_path, config)
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 5]  # the last line comes with the final checkpoint
    for line, number in zip(lines, (3, 7, 9), strict=True):  # two micro-steps per step
        counts = [(number + step) % 5 for step in range(12)]
        steps = sorted((number + step) % 12 for step in range(8))
        assert line["path"] == f"{3 * number % DATASET_SIZE}.mp4"
        assert line["candidate_frames"] == [number + 2 * place for place in range(CANDIDATES)]
        assert (line["counts"], line["steps"]) == (counts, steps)
        assert line["probabilities"] == pytest.approx([count / sum(counts) for count in counts], abs=1e-6)
        assert line["frames"] == [frame for step in steps for frame in (number + 4 * step, number + 4 * step + 2)]


def test_run_that_chooses_no_frames_writes_none(tmp_path: Path) -> None:
    train(tmp_path, make_config(RunConfig(max_steps=2, log_every_steps=1)))
    assert not (tmp_path / "media").exists()


def test_frames_are_chosen_in_pretraining_from_more_candidates_only() -> None:
    config = make_config(RunConfig())
    assert chooses_frames(with_alpha(config, 1.5))
    assert not chooses_frames(config)
    assert not chooses_frames(get_recipe("demo_ft"))


@pytest.mark.parametrize("torn", ["", '{"step": 3, "path": "', '{"step": 3}'])
def test_line_that_a_crash_cut_short_is_dropped_and_steps_may_repeat(tmp_path: Path, torn: str) -> None:
    config = with_alpha(make_config(RunConfig(max_steps=4, log_every_steps=1)), 1.5)
    train(tmp_path, config)
    whole = read_lines(tmp_path)
    with (tmp_path / "media" / "frames.jsonl").open("a") as file:
        file.write(torn)
    train(tmp_path, config, start_step=2)
    lines = read_lines(tmp_path)
    assert lines[:4] == whole
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 3, 4]


def test_file_of_nothing_but_a_torn_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "media" / "frames.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1')
    FrameLog(tmp_path, ROWS, ChoosingTask()).on_start()
    assert path.read_text() == ""


def test_nothing_is_written_before_the_first_line(tmp_path: Path) -> None:
    """Callbacks exist before the run owns its directory; an empty media/ would make the next start refuse it."""
    FrameLog(tmp_path / "run", ROWS, ChoosingTask()).on_start()
    assert list(tmp_path.iterdir()) == []
