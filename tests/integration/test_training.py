"""Complete runs: one process against two, accumulation, ZeRO stages, resuming, bad videos.

The reference of all comparisons is one process at ZeRO-0, in float32. Measured worst relative difference of the
loss over 20 steps: 1.5e-7.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch

import everest_ds.model.registry  # noqa: F401  (registers the models)
from tests.conftest import REPOSITORY
from tests.integration.launch import SMALL, compute, contents, ds_config, flags, launch, losses, metrics
from tests.integration.scanning import scan

LOSS_RTOL = 1e-5
NUM_STEPS = 20

TRAIN_KEYS = {
    "kind", "step", "time_s", "epoch", "samples", "loss", "grad_norm", "lr", "weight_decay", "clips_per_s",
    "tokens_per_s", "data_wait_ms", "stalled", "step_ms", "memory_gib", "mfu",
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, ZeRO-0, no accumulation."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    words = [*SMALL, "--ds-config", ds_config("zero0"), "--batch.micro-size", "32"]
    done = compute(flags(demo_folder, out, *words))
    assert done.returncode == 0, done.stderr
    return out


def test_run_directory_is_as_documented(reference: Path) -> None:
    names = {path.name for path in reference.iterdir() if not path.match("events.out.tfevents.*")}
    assert names == {
        "config.json", "ds_config.json", "environment.json", "owner.lock", "metrics.jsonl", "checkpoints",
        "logs",
    }  # fmt: skip
    lines = metrics(reference)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert all(set(line) == TRAIN_KEYS for line in lines)
    assert all(line["grad_norm"] > 0 and line["mfu"] is None for line in lines)
    assert lines[-1]["samples"] == NUM_STEPS * 32
    assert metrics(reference, "event")[0]["event"] == "start"
    latest = (reference / "checkpoints" / "latest").read_text().strip()
    assert latest == f"step-{NUM_STEPS:08d}"
    folder = reference / "checkpoints" / latest
    sealed = json.loads((folder / "complete.json").read_text())["files"]
    assert set(sealed) == {p.name for p in folder.iterdir()} - {"complete.json"}
    environment = json.loads((reference / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]


def test_loss_falls(reference: Path) -> None:
    values = losses(reference)
    assert sum(values[-5:]) < 0.95 * sum(values[:5])


def test_skipped_steps_are_in_the_record_of_a_run(demo_folder: Path, tmp_path: Path) -> None:
    """At such a learning rate the loss is not finite after the first update: all later steps are skipped."""
    words = [*SMALL, "--optim.base-lr", "1e30", "--optim.warmup-epochs", "0", "--run.max-skipped-steps", "2"]
    done = compute(flags(demo_folder, tmp_path / "run", *words), processes=2)
    assert done.returncode == 2, done.stderr
    skipped = [line for line in metrics(tmp_path / "run", "event") if line["event"] == "skipped_step"]
    assert [(line["step"], line["num_skipped"]) for line in skipped] == [(2, 1), (3, 2), (4, 3)]
    assert all(line["samples"] for line in skipped)
    assert "run.max_skipped_steps=2" in done.stderr


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_two_processes_equal_one_at_every_stage(
    stage: int, reference: Path, demo_folder: Path, tmp_path: Path
) -> None:
    start = launch if stage == 2 else compute  # one of them with the real launcher
    words = [*SMALL, "--ds-config", ds_config(f"zero{stage}")]
    done = start(flags(demo_folder, tmp_path / "run", *words), processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=LOSS_RTOL)
    norms, expected = ([line["grad_norm"] for line in metrics(run)] for run in (tmp_path / "run", reference))
    assert norms == pytest.approx(expected, rel=1e-4)
    assert json.loads((tmp_path / "run" / "ds_config.json").read_text())["zero_optimization"]["stage"] == stage


def test_accumulation_of_4_equals_1(reference: Path, demo_folder: Path, tmp_path: Path) -> None:
    done = compute(flags(demo_folder, tmp_path / "run", *SMALL, "--batch.micro-size", "8"))
    assert done.returncode == 0, done.stderr
    steps = [
        json.loads((run / "ds_config.json").read_text())["gradient_accumulation_steps"]
        for run in (reference, tmp_path / "run")
    ]
    assert steps == [1, 4]
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=LOSS_RTOL)


@pytest.mark.parametrize("processes", [1, 2])
def test_gradient_that_is_not_finite_on_one_process_changes_no_weight_at_any_stage(
    processes: int, tmp_path: Path
) -> None:
    """One good step and one of NaN: the second is not applied, and AdamW counts one update.

    At ZeRO-0 in bf16, DeepSpeed's own first step on zero gradients would count as a second update; the project
    undoes it. Nothing is compiled during the test: neither an optimiser nor shared memory for gloo.
    """
    precisions = ("fp32", "bf16", "autocast")
    words = [REPOSITORY / "ds_configs", *precisions]
    seen = scan("nan_step", *words, processes=processes, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert not list(tmp_path.iterdir())
    cases = [(line["precision"], line["stage"], line["rank"]) for line in seen]
    assert sorted(cases) == sorted(
        (precision, stage, rank) for precision in precisions for stage in range(4) for rank in range(processes)
    )
    outcomes = [(line["applied"], line["has_norm"], line["weights_are_fine"], line["updates"]) for line in seen]
    assert outcomes == [(False, False, True, 1.0)] * len(seen)


def test_foreign_checkpoint_is_refused_and_the_run_directory_left_as_it_was(
    reference: Path, demo_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    before = contents(run)
    words = flags(demo_folder, run, *SMALL, "--batch.micro-size", "32", steps=NUM_STEPS + 1)
    other_stage = compute([*words, "--ds-config", ds_config("zero2")])
    assert other_stage.returncode == 2
    assert "at ZeRO stage 0; this run has 1 at stage 2" in other_stage.stderr
    assert "Traceback" not in other_stage.stderr
    assert contents(run) == before


def list_with_bad_rows(demo_folder: Path, path: Path, num_bad: int) -> Path:
    rows = (demo_folder / "train.csv").read_text().splitlines()
    rows = [f"{demo_folder}/{row}" for row in rows]
    for number in range(num_bad):
        broken = path.parent / f"broken{number}.mp4"
        broken.write_bytes(b"no video\n" * 50)
        rows[number] = f"{broken} 0"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_bad_video_is_replaced_counted_and_recorded(demo_folder: Path, tmp_path: Path) -> None:
    bad_list = list_with_bad_rows(demo_folder, tmp_path / "list.csv", 1)
    words = [*SMALL, "--data.train-list", str(bad_list), "--data.max-bad-share", "0.02"]
    done = compute(flags(demo_folder, tmp_path / "run", *words, steps=8))  # two epochs: the bad row is drawn twice
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["epoch"] for record in records] == [0, 1]
    assert {record["path"] for record in records} == {str(tmp_path / "broken0.mp4")}
    assert all("Invalid data found" in record["reason"] for record in records)
    assert len(losses(tmp_path / "run")) == 8


def test_too_many_bad_videos_stop_the_run(demo_folder: Path, tmp_path: Path) -> None:
    bad_list = list_with_bad_rows(demo_folder, tmp_path / "list.csv", 4)  # 3 % of 128, 1 % is allowed
    done = compute(flags(demo_folder, tmp_path / "run", *SMALL, "--data.train-list", str(bad_list)), processes=2)
    assert done.returncode == 2
    assert "of 128 draws could not be read, more than data.max_bad_share=0.01" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("could not be read") == 1


def test_list_of_nothing_but_bad_videos_stops_at_once(demo_folder: Path, tmp_path: Path) -> None:
    bad_list = list_with_bad_rows(demo_folder, tmp_path / "list.csv", 128)
    done = compute(flags(demo_folder, tmp_path / "run", "--data.train-list", str(bad_list)))
    assert done.returncode == 2
    assert "11 videos drawn in a row cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_codec_of_the_real_clips_trains(real_clips: Path, tmp_path: Path) -> None:
    """46 real videos of 1 to 1,950 frames, in many codecs and containers: each is in every step, none is bad."""
    videos = sorted(path for path in real_clips.iterdir() if path.suffix not in (".csv", ".md") and path.is_file())
    assert len(videos) == 46
    (tmp_path / "list.csv").write_text("".join(f"{path} 0\n" for path in videos))
    words = flags(tmp_path, tmp_path / "run", *SMALL, "--data.train-list", str(tmp_path / "list.csv"), steps=4)
    batch = ["--batch.global-size", "46", "--batch.micro-size", "23"]
    done = compute([*words, *batch, "--ds-config", ds_config("zero2")], processes=2)
    assert done.returncode == 0, done.stderr
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()


@pytest.mark.slow
def test_vit_l_step_fits_the_machine_and_vit_h_is_built(demo_folder: Path, tmp_path: Path) -> None:
    """ViT-L at 16x224x224, micro-batch 2, two processes, ZeRO-2, checkpointing; measured 5.8 GiB a process."""
    words = ["pretrain", "k400_vit_l", "--data.train-list", str(demo_folder / "train.csv"), "--run.max-steps", "1"]
    words += ["--batch.global-size", "4", "--batch.micro-size", "2", "--model.activation-checkpointing"]
    words += ["--data.num-workers", "0", "--run.log-every-steps", "1", "--precision", "fp32"]
    done = launch([*words, "--ds-config", ds_config("zero2"), "--out", str(tmp_path / "run")], processes=2)
    assert done.returncode == 0, done.stderr
    (line,) = metrics(tmp_path / "run")
    assert 2 * line["memory_gib"] < 24
    model = timm.create_model("everest_pretrain_vit_huge_patch16_224")
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == 653_104_256
    )  # as counted by hand in test_registry.py
