"""Pictures in complete runs: results stay bitwise identical, also over several starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everest_ds.train.checkpoints.consolidated import read_fp32_weights
from tests.integration.launch import PICTURES, SMALL, compute, ds_config, flags, losses

STEPS = 6
FIRST, LAST = "step-00000001.png", f"step-{STEPS:08d}.png"


def drawn(run_dir: Path) -> dict[str, set[str]]:
    folders = (folder for folder in (run_dir / "media").iterdir() if folder.is_dir())
    return {folder.name: {path.name for path in folder.iterdir()} for folder in folders}


def run(words: list[str], processes: int) -> str:
    done = compute(words, processes=processes)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def require_same_numbers(run_dir: Path, expected: Path) -> None:
    assert losses(run_dir) == losses(expected)
    ours, theirs = (read_fp32_weights(path / "checkpoints" / f"step-{STEPS:08d}") for path in (run_dir, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("stage", "extra"),
    [
        (2, ["--selection.alpha", "1.5"]),
        (3, []),
        pytest.param(3, ["--selection.alpha", "1.5", "--precision", "bf16"], marks=pytest.mark.slow),
        pytest.param(1, ["--precision", "autocast", "--selection.budget", "threshold"], marks=pytest.mark.slow),
        pytest.param(0, ["--data.resize", "device", "--data.repeats", "2"], marks=pytest.mark.slow),
    ],
)
def test_losses_and_weights_are_the_same_bits_with_pictures(
    stage: int, extra: list[str], demo_folder: Path, tmp_path: Path
) -> None:
    """In two starts: the second draws the same clips, but not at its first line."""
    words = [*SMALL, "--ds-config", ds_config(f"zero{stage}"), "--run.save-every-steps", "3", *extra]
    precision = ["--precision", "fp32"] if "--precision" in extra else []
    plain, shown = flags(demo_folder, tmp_path / "plain", *words, steps=STEPS), []
    for steps in (3, STEPS):
        shown.append(flags(demo_folder, tmp_path / "shown", *words, PICTURES, "2", steps=steps))
    for command in (plain, *shown):
        if precision:  # drop the one of `flags`; this test gives its own
            place = command.index("--precision")
            del command[place : place + 2]
        said = run(command, 2)
        assert "no more pictures" not in said, said
    require_same_numbers(tmp_path / "shown", tmp_path / "plain")
    assert not (tmp_path / "plain" / "media" / "clips.npz").exists()
    found = drawn(tmp_path / "shown")
    assert set(found) == {"clip-1", "clip-2", "kept-by-step"}
    assert all({FIRST, LAST} <= names for names in found.values())
    assert (tmp_path / "shown" / "media" / "curves.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_fine_tuning_draws_what_the_classifier_keeps(stage: int, demo_folder: Path, tmp_path: Path) -> None:
    for name, every in ("plain", "0"), ("shown", "1000"):
        words = ["finetune", "demo_ft", "--data.train-list", str(demo_folder / "train.csv"), *SMALL]
        words += ["--out", str(tmp_path / name), "--run.max-steps", str(STEPS), "--run.log-every-steps", "1"]
        words += ["--data.num-workers", "0", "--batch.micro-size", "16", "--precision", "fp32", PICTURES, every]
        run([*words, "--data.mixup-alpha", "0.8", "--ds-config", ds_config(f"zero{stage}")], 2)
    require_same_numbers(tmp_path / "shown", tmp_path / "plain")
    assert drawn(tmp_path / "shown") == {name: {FIRST, LAST} for name in ("clip-1", "clip-2", "kept-by-step")}
