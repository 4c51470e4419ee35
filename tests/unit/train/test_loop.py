from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.config import BatchConfig, OptimConfig, PretrainConfig, RunConfig
from everest_ds.data.clips.batch import BadSample, ClipBatch
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.recipes import get_recipe
from everest_ds.train.callbacks import Callback
from everest_ds.train.checkpoints.save import TrainState
from everest_ds.train.checkpoints.saving.files import CheckpointFiles
from everest_ds.train.loop import Trainer
from everest_ds.train.record.bad_samples import BadSamples
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.record.skipped_steps import SkippedSteps
from everest_ds.train.schedule import Schedule
from everest_ds.train.signals import STOP_SIGNALS
from everest_ds.train.step.optim import learning_rate
from everest_ds.train.step.updater import DeepSpeedUpdater, StepResult

# Files that DeepSpeed writes on one rank at ZeRO-2.
MODEL_STATES, SHARD = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
ALONE = World(rank=0, local_rank=0, size=1, local_size=1)
CPU = torch.device("cpu")
DATASET_SIZE = 40  # five steps an epoch at a batch of eight


class FakeEngine:
    """Returns given losses and records the loop's calls."""

    device = CPU
    module = torch.nn.Linear(1, 1)
    discards = True  # skips steps with a non-finite gradient, like DeepSpeed

    def __init__(self, losses: list[float], accumulation: int, norm: float) -> None:
        self.skipped_steps = 0
        self.norm = norm
        self.losses = iter(losses)
        self.accumulation = accumulation
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
        self.micro_steps = 0
        self.rates: list[float] = []
        self.saved: list[str] = []

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.loss = torch.tensor(next(self.losses))
        return self.loss

    def train(self) -> None:
        pass

    def zero_optimization_stage(self) -> int:
        return 3

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro_steps + 1) % self.accumulation == 0

    def backward(self, loss: torch.Tensor) -> None:
        pass

    def step(self) -> None:
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.micro_steps += 1
        if self.discards and not (math.isfinite(self.norm) and self.loss.isfinite()):
            self.skipped_steps += 1

    def get_global_grad_norm(self) -> float:
        return self.norm

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir()
        for name in (MODEL_STATES, SHARD):
            (Path(folder) / tag / name).touch()
        self.saved.append(tag)


class FakeTask:
    visible_tokens = 28
    threshold: float | None = None

    def clip_flops(self) -> float:
        return 1e9

    def inputs(self, batch: ClipBatch, device: torch.device) -> tuple[torch.Tensor]:
        return (batch.clips_BCTHW,)


def batches(bad_at: dict[int, int]) -> Iterator[ClipBatch]:
    """Generate endless batches of two rows; those in ``bad_at`` report as many unreadable draws."""
    for number in range(10**6):
        bad = [BadSample(f"{i}.mp4", "broken", 0, i) for i in range(bad_at.get(number, 0))]
        empty = torch.zeros(0)
        index_B = torch.tensor([2 * number, 2 * number + 1]) % DATASET_SIZE
        yield ClipBatch(clips_BCTHW=empty, frames_BT=empty, noise_BS=empty, label_B=empty, index_B=index_B, bad=bad)


def make_config(run: RunConfig, *, micro_size: int = 8) -> PretrainConfig:
    return replace(
        get_recipe("demo"),
        optim=OptimConfig(base_lr=1.0, warmup_epochs=1, epochs=4),
        batch=BatchConfig(global_size=8, micro_size=micro_size),
        run=run,
    )


def train(
    tmp_path: Path,
    losses: list[float],
    run: RunConfig,
    *,
    micro_size: int = 8,
    bad_at: dict[int, int] | None = None,
    norm: float = 0.25,
    source: Iterator[ClipBatch] | None = None,
    callbacks: Sequence[Callback] = (),
    start_step: int = 0,
) -> tuple[FakeEngine, list[dict[str, Any]]]:
    config = make_config(run, micro_size=micro_size)
    rows = [VideoRow(Path(f"{number}.mp4"), 0) for number in range(DATASET_SIZE)]
    engine = FakeEngine(losses, config.batch.accumulation_steps(1), norm)
    log = MetricsLog(tmp_path)
    trainer = Trainer(
        engine=engine,
        updater=DeepSpeedUpdater(engine, config.optim.max_grad_norm),
        task=FakeTask(),  # type: ignore[arg-type]
        config=config,
        schedule=Schedule.of(config, DATASET_SIZE, start_step=start_step),
        world=ALONE,
        device=CPU,
        run_dir=tmp_path,
        log=log,
        start=TrainState(world_size=1, zero_stage=2, dtype="float32", videos="40 videos, abc"),
        callbacks=[
            SkippedSteps(rows, log, allowed=run.max_skipped_steps, count=0),
            BadSamples(
                tmp_path, ALONE, max_share=config.data.max_bad_share, num_rows=len(rows), global_size=8, count=0
            ),
            *callbacks,
        ],
    )
    try:
        trainer.run(source or batches(bad_at or {}))
    finally:
        log.close()
    return engine, read_lines(tmp_path)


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_logged_loss_is_the_mean_since_the_last_line_over_micro_steps(tmp_path: Path) -> None:
    losses = [1.0, 3.0, 5.0, 7.0, 2.0, 2.0, 4.0, 4.0]  # four steps of two micro-steps
    engine, lines = train(tmp_path, losses, RunConfig(max_steps=4, log_every_steps=2), micro_size=4)
    steps = [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]
    assert steps == [(2, 4.0, 0.25), (4, 3.0, 0.25)]
    assert engine.micro_steps == 8


def test_learning_rate_is_set_before_every_step(tmp_path: Path) -> None:
    run = RunConfig(log_every_steps=100)
    engine, _ = train(tmp_path, [1.0] * 20, run)
    config = make_config(run)
    assert engine.rates == [learning_rate(step, config.optim, config.batch, 5) for step in range(20)]


def test_checkpoints_come_at_epochs_steps_and_the_end(tmp_path: Path) -> None:
    run = RunConfig(max_steps=17, save_every_epochs=2, save_every_steps=4, keep_checkpoints=1, keep_every_epochs=2)
    engine, lines = train(tmp_path, [1.0] * 17, run)
    assert engine.saved == [f"tmp-step-{step:08d}" for step in (4, 8, 10, 12, 16, 17)]
    # Every save writes a line, so that each saved step is in the record.
    assert [line["step"] for line in lines if line["kind"] == "train"] == [4, 8, 10, 12, 16, 17]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000010", "step-00000017"]


def test_loss_that_is_not_finite_stops_the_run_before_a_save_and_names_rank_and_samples(tmp_path: Path) -> None:
    run = RunConfig(max_steps=6, save_every_steps=2, log_every_steps=100)
    message = (
        r"the loss of rank 0 is not finite at step 3, and no weight was changed; samples: 4.mp4, 5.mp4 \(all in"
    )
    with pytest.raises(UserError, match=message):
        train(tmp_path, [1.0, 1.0, float("nan"), 1.0, 1.0, 1.0], run)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*step-*")] == ["step-00000002"]
    event = read_lines(tmp_path)[-1]
    assert (event["event"], event["step"]) == ("skipped_step", 3)
    assert event["samples"] == {"rank_0": ["4.mp4", "5.mp4"]}


def test_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a gradient, though no loss, is not finite at step 1"):
        train(tmp_path, [1.0] * 4, RunConfig(max_steps=4, save_every_steps=2), norm=float("nan"))
    assert not (tmp_path / "checkpoints").exists()


def test_norm_that_is_not_finite_of_a_step_that_was_applied_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "discards", False)
    with pytest.raises(UserError, match=r"not finite at step 2: gradient norm; the last checkpoint is kept"):
        train(tmp_path, [1.0] * 4, RunConfig(max_steps=4, save_every_steps=2), norm=float("nan"))
    assert not (tmp_path / "checkpoints").exists()


def test_allowed_number_of_steps_is_skipped_and_left_out_of_the_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = float("inf")
    run = RunConfig(max_steps=6, log_every_steps=2, max_skipped_steps=2)
    _, lines = train(tmp_path, [1.0, bad, 3.0, 4.0, bad, 5.0], run)
    assert [line["loss"] for line in lines if line["kind"] == "train"] == [1.0, 3.5, 5.0]
    state = json.loads((tmp_path / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["num_skipped"] == 2
    assert "skipped, 2 of 2 allowed" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"run.max_skipped_steps=1"):
        train(tmp_path / "other", [1.0, bad, bad], RunConfig(max_steps=3, max_skipped_steps=1))


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_signal_saves_at_the_next_step_boundary(
    signum: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> Iterator[ClipBatch]:
        for number, batch in enumerate(batches({})):
            if number == 6:
                os.kill(os.getpid(), signum)
                os.kill(os.getpid(), signal.SIGTERM)  # a repeated request
            yield batch

    run = RunConfig(max_steps=15, log_every_steps=5, save_every_steps=3)
    engine, lines = train(tmp_path, [1.0] * 15, run, source=interrupted())
    assert engine.saved[-1] == "tmp-step-00000007"  # the last step is the one in which the signal came
    assert [line["step"] for line in lines if line["kind"] == "train"] == [3, 5, 6, 7]
    assert (lines[-1]["event"], lines[-1]["signal"]) == ("stopped", signum.name)
    said = capsys.readouterr().out
    assert f"{signum.name}: stopped after step 7 of 15, all saved; the same command resumes the run" in said


def test_signal_during_the_last_step_lets_the_run_end(tmp_path: Path) -> None:
    def interrupted() -> Iterator[ClipBatch]:
        for number, batch in enumerate(batches({})):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    engine, lines = train(tmp_path, [1.0] * 3, RunConfig(max_steps=3), source=interrupted())
    assert engine.saved == ["tmp-step-00000003"]
    assert all(line.get("event") != "stopped" for line in lines)


def test_signal_during_a_save_does_not_save_the_same_step_again(tmp_path: Path) -> None:
    def interrupted() -> Iterator[ClipBatch]:
        for number, batch in enumerate(batches({})):
            if number == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
            yield batch

    engine, _ = train(tmp_path, [1.0] * 9, RunConfig(max_steps=9, save_every_steps=3), source=interrupted())
    assert engine.saved == ["tmp-step-00000003", "tmp-step-00000006"]


def test_bad_samples_are_recorded_and_too_many_stop_the_run(tmp_path: Path) -> None:
    run = RunConfig(max_steps=4, log_every_steps=1)
    with pytest.raises(UserError, match=r"2 of 40 draws could not be read, more than data.max_bad_share=0.01"):
        train(tmp_path, [1.0] * 4, run, bad_at={1: 2})
    records = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert [(record["path"], record["reason"]) for record in records] == [("0.mp4", "broken"), ("1.mp4", "broken")]


class Listener(Callback):
    """Records the called hooks; asks for a line after step 2 and a checkpoint after step 4."""

    checkpoint_bytes = 3

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_start(self) -> None:
        self.seen.append("start")

    def on_batch(self, batch: ClipBatch) -> None:
        self.seen.append("batch")

    def on_step(self, step: int, losses: Sequence[torch.Tensor], result: StepResult) -> None:
        self.seen.append(f"step {step} of {len(losses)}")

    def wants_log(self, step: int) -> bool:
        return step == 2

    def before_log(self, step: int) -> None:
        self.seen.append(f"before log {step}")

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        self.seen.append(f"log {step}: {values['loss']}")

    def wants_save(self, step: int) -> bool:
        return step == 4

    def on_save(self, state: TrainState) -> TrainState:
        self.seen.append(f"save {state.step}")
        return replace(state, num_bad=7)

    def write_checkpoint(self, files: CheckpointFiles) -> None:
        files.add_tensors("more", [("x", torch.zeros(1))], {})

    def on_end(self, step: int) -> None:
        self.seen.append(f"end {step}")


def test_callbacks_are_called_at_their_moments_and_add_to_checkpoints(tmp_path: Path) -> None:
    listener, run = Listener(), RunConfig(max_steps=5, log_every_steps=4)
    train(tmp_path, [1.0] * 10, run, micro_size=4, callbacks=[listener])
    assert listener.seen == [
        "start",
        *("batch", "batch", "step 1 of 2"),
        *("batch", "batch", "step 2 of 2", "before log 2", "log 2: 1.0"),
        *("batch", "batch", "step 3 of 2"),
        *("batch", "batch", "step 4 of 2", "before log 4", "log 4: 1.0", "save 4"),
        *("batch", "batch", "step 5 of 2", "before log 5", "log 5: 1.0", "save 5"),
        "end 5",
    ]  # fmt: skip
    folder = tmp_path / "checkpoints" / "step-00000004"
    assert json.loads((folder / "state.json").read_text())["num_bad"] == 7
    assert "more" in json.loads((folder / "complete.json").read_text())["files"]


def test_run_with_no_step_left_still_ends(tmp_path: Path) -> None:
    listener = Listener()
    _, lines = train(tmp_path, [], RunConfig(max_steps=3), callbacks=[listener], start_step=4)
    assert listener.seen == ["start", "end 4"]
    assert [(line["event"], line["step"]) for line in lines] == [("end", 4)]


def test_list_shorter_than_a_batch_is_refused() -> None:
    config = make_config(RunConfig())
    with pytest.raises(UserError, match=r"7 videos, fewer than batch.global_size=8"):
        Schedule.of(config, 7)
    assert Schedule.of(config, 41) == Schedule(steps_per_epoch=5, start_step=0, end_step=20)
