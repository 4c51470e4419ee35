"""Complete fine-tuning runs: worlds and ZeRO stages against one process, resuming, best checkpoint.

Everything random is on: drop path, mixup and CutMix, random erasing, repeated sampling, RandAugment. So are layer
decay and the moving average.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from everest_ds.data.demo import DemoConfig, write_demo_data
from everest_ds.train.checkpoints.consolidated import read_any_weights, read_fp32_weights
from tests.integration.launch import SMALL, compute, contents, ds_config, losses, metrics

LOSS_RTOL = 1e-6
NUM_STEPS = 8
DRAWS = (
    "--model.drop-path", "0.2", "--data.mixup-alpha", "0.8", "--data.cutmix-alpha", "1.0",
    "--data.erase-prob", "0.25", "--data.repeats", "2", "--data.rand-augment", "rand-m7-n4-mstd0.5-inc1",
    "--optim.ema-decay", "0.9",
)  # fmt: skip


@pytest.fixture(scope="session")
def labelled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training videos and 11 for validation, which two processes cannot divide evenly."""
    folder = tmp_path_factory.mktemp("labelled")
    write_demo_data(folder, DemoConfig(train=48, val=11, test=0))
    return folder


def finetune(folder: Path, out: Path, *extra: str, steps: int = NUM_STEPS, stage: int = 2) -> list[str]:
    """Arguments of a short fine-tuning that logs every step and scores every second one."""
    words = ["finetune", "demo_ft", "--data.train-list", str(folder / "train.csv"), "--out", str(out)]
    words += ["--data.val-list", str(folder / "val.csv"), "--data.num-workers", "0", "--precision", "fp32"]
    words += ["--batch.global-size", "48", "--batch.micro-size", "24", "--run.log-every-steps", "1"]
    words += ["--run.validate-every-epochs", "1", "--run.max-steps", str(steps)]
    return [*words, "--ds-config", ds_config(f"zero{stage}"), *SMALL, *DRAWS, *extra]


@pytest.fixture(scope="module")
def alone(labelled_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process at ZeRO-0."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    done = compute(finetune(labelled_folder, out, stage=0))
    assert done.returncode == 0, done.stderr
    return out


def test_run_says_what_it_trains(alone: Path, labelled_folder: Path) -> None:
    start = metrics(alone, "event")[0]
    scales = {group["lr_scale"] for group in start["groups"]}
    assert scales == {0.75**power for power in range(5)}  # embedding, three blocks, head
    assert len(start["groups"]) == 10  # with and without weight decay
    lines = metrics(alone)
    assert len(lines) == NUM_STEPS
    assert all(line["lr_min"] == pytest.approx(line["lr"] * 0.75**4) for line in lines[1:])
    assert (alone / "classes.txt").read_text() == (labelled_folder / "classes.txt").read_text()
    assert json.loads((alone / "config.json").read_text())["data"]["num_classes"] == 8


def test_validation_is_recorded_and_the_best_is_kept(alone: Path) -> None:
    scored = metrics(alone, "val")
    assert [line["step"] for line in scored] == [2, 4, 6, 8]
    assert all(line["num_scored"] == 11 and line["weights"] == "ema" for line in scored)
    best = max(scored, key=lambda line: (line["top1"], -line["step"]))
    assert scored[-1]["best_step"] == best["step"]
    assert (alone / "checkpoints" / "best").read_text().strip() == f"step-{best['step']:08d}"
    assert (alone / "checkpoints" / f"step-{best['step']:08d}" / "complete.json").is_file()


def test_evaluate_takes_the_best_checkpoint_and_its_average(
    alone: Path, labelled_folder: Path, tmp_path: Path
) -> None:
    words = ["evaluate", alone, "--list", labelled_folder / "val.csv", "--out", tmp_path / "evaluation"]
    done = compute(
        [*words, "--num-temporal", "1", "--num-spatial", "1", "--num-workers", "0", "--batch-rows", "24"]
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    best = (alone / "checkpoints" / "best").read_text().strip()
    assert (summary["checkpoint"]["name"], summary["checkpoint"]["weights"]) == (best, "ema")
    (scored,) = (line for line in metrics(alone, "val") if line["is_best"] and f"{line['step']:08d}" in best)
    assert summary["loss"] == pytest.approx(scored["loss"], rel=1e-5)  # written with six digits
    assert summary["top1"] == scored["top1"]
    assert summary["classes"] == (labelled_folder / "classes.txt").read_text().split()


def test_weights_of_the_run_are_the_best_ones_with_their_class_names(alone: Path, labelled_folder: Path) -> None:
    weights = read_any_weights(alone)
    assert weights.architecture.labels == tuple((labelled_folder / "classes.txt").read_text().split())
    best = alone / "checkpoints" / (alone / "checkpoints" / "best").read_text().strip()
    assert str(best) in weights.source
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in read_fp32_weights(best).items())


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_equal_one(stage: int, alone: Path, labelled_folder: Path, tmp_path: Path) -> None:
    """Losses, scores, averages and weights; measured: all identical, gradient norms within 1.5e-7."""
    out = tmp_path / "run"
    done = compute(finetune(labelled_folder, out, stage=stage), processes=2)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(losses(out)), torch.tensor(losses(alone)), rtol=LOSS_RTOL, atol=0)
    for ours, theirs in zip(metrics(out, "val"), metrics(alone, "val"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS_RTOL)
        assert (ours["top1"], ours["num_scored"]) == (theirs["top1"], 11)
    last = f"checkpoints/step-{NUM_STEPS:08d}"
    for ours, theirs in (
        (load_file(out / last / "ema.safetensors"), load_file(alone / last / "ema.safetensors")),
        (read_fp32_weights(out / last), read_fp32_weights(alone / last)),
    ):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=2e-6)


def test_going_on_is_bitwise_the_run_without_a_break(alone: Path, labelled_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for steps in (3, NUM_STEPS):
        done = compute(finetune(labelled_folder, out, steps=steps, stage=0))
        assert done.returncode == 0, done.stderr
    assert losses(out) == losses(alone)
    last = f"checkpoints/step-{NUM_STEPS:08d}"
    ours, theirs = (load_file(run / last / "ema.safetensors") for run in (out, alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    keep = ("step", "top1", "loss", "best_step", "is_best")
    shared = [line for line in metrics(out, "val") if line["step"] % 2 == 0]  # scored at the break, too
    assert [{k: line[k] for k in keep[:3]} for line in shared] == [
        {k: line[k] for k in keep[:3]} for line in metrics(alone, "val")
    ]


def test_linear_probe_changes_the_head_alone(labelled_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    frozen = ("--model.freeze-encoder", "--model.drop-path", "0", "--run.save-every-steps", "2")
    done = compute(finetune(labelled_folder, out, *frozen, steps=4))
    assert done.returncode == 0, done.stderr
    assert {group["lr_scale"] for group in metrics(out, "event")[0]["groups"]} == {1.0}
    first, second = (read_fp32_weights(out / "checkpoints" / f"step-{step:08d}") for step in (2, 4))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


def test_another_task_is_refused_and_the_directory_stays(alone: Path, demo_folder: Path) -> None:
    before = contents(alone)
    words = ["pretrain", "demo", "--data.train-list", str(demo_folder / "train.csv"), "--out", str(alone)]
    done = compute(words)
    assert done.returncode == 2
    assert "its task is finetune, this one's pretrain" in done.stderr
    assert contents(alone) == before
