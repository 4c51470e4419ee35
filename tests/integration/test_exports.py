"""`everest convert --to hf` and other layouts on a fine-tuned run: output, files and refusals."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from everest_ds.cli import main
from everest_ds.data.lists.video_list import read_list
from everest_ds.model.weights.reading import read_weights
from everest_ds.train.checkpoints.consolidated import ALONE
from everest_ds.train.checkpoints.save import AVERAGE
from everest_ds.train.checkpoints.seal import SEAL, seal
from tests.conftest import REPOSITORY
from tests.integration.launch import compute, cpu_environment, ds_config
from tests.integration.test_bad_input import refused

KEPT = "keeps 0.3 of the tokens (86 of 288)"
STATES = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def lists(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos to train on, eight others to score."""
    folder, rows = tmp_path_factory.mktemp("lists"), read_list(demo_folder / "train.csv")
    for name, part in (("few.csv", rows[:8]), ("scored.csv", rows[8:16])):
        (folder / name).write_text("".join(f"{row.path},{row.label}\n" for row in part))
    shutil.copy(demo_folder / "classes.txt", folder)
    return folder


def words(lists: Path, out: Path, *extra: str) -> list[str]:
    fixed = ["finetune", "demo_ft", "--data.train-list", lists / "few.csv", "--data.val-list", lists / "scored.csv"]
    fixed += ["--out", out, "--precision", "fp32", "--data.num-workers", "0", "--ds-config", ds_config("zero0")]
    fixed += [
        "--batch.global-size",
        "4",
        "--batch.micro-size",
        "4",
        "--optim.epochs",
        "1",
        "--optim.warmup-epochs",
        "0",
    ]
    return [str(word) for word in [*fixed, "--optim.ema-decay", "0.5", *extra]]


@pytest.fixture(scope="module")
def run(lists: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with an average, and its evaluation."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = compute(words(lists, out))
    assert done.returncode == 0, done.stderr
    scored = compute(["evaluate", out, "--list", lists / "scored.csv", "--num-workers", "0"])
    assert scored.returncode == 0, scored.stderr
    return out


def test_conversion_says_how_many_tokens_are_kept_and_what_transformers_does(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(run), str(tmp_path / "hf"), "--to", "hf"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"the model {KEPT} of a clip; transformers' own VideoMAE uses all of them" in said
    assert "load it with trust_remote_code=True" in said
    assert "`everest evaluate` scores the run's moving average; --weights ema writes that one" in said


def test_folder_holds_what_reproduces_the_run(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    assert main(["convert", str(run), str(folder), "--to", "hf", "--weights", "ema"]) == 0
    files = {"config.json", "model.safetensors", "preprocessor_config.json", "video_preprocessor_config.json"}
    assert {path.name for path in folder.iterdir()} == files | {
        "README.md", "modeling_everest.py", "processing_everest.py"
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    expected = {"keep_ratio": 0.3, "strategy": "rero", "order": "descending", "distance": "l2", "num_kept": 86}
    assert config["everest"].items() >= expected.items()
    names = (run / "classes.txt").read_text().split("\n")[:-1]
    assert config["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert config["label2id"] == {name: i for i, name in enumerate(names)}
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert (images["size"], images["crop_size"]) == ({"shortest_edge": 48}, {"height": 48, "width": 48})
    videos = json.loads((folder / "video_preprocessor_config.json").read_text())
    assert (videos["num_frames"], videos["sampling"], videos["sampling_stride"]) == (16, "dense", 2)
    for name in ("modeling_everest.py", "processing_everest.py"):
        assert "everest_ds" not in [line.split()[1].split(".")[0] for line in imports_of(folder / name)]


def imports_of(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]


def test_average_is_written_where_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    """Bitwise identical to the checkpoint's average, which differs from the weights."""
    (checkpoint,) = (path for path in (run / "checkpoints").iterdir() if path.is_dir())
    average = load_file(checkpoint / AVERAGE)
    for name, layout in (("w.safetensors", "everest"), ("w.pth", "videomae"), ("w", "hf")):
        for kind in ("model", "ema"):
            target = tmp_path / f"{kind}-{name}"
            assert main(["convert", str(run), str(target), "--to", layout, "--weights", kind]) == 0
            written = read_weights(target).tensors
            assert written.keys() == average.keys()
            assert all(torch.equal(written[n], average[n]) for n in average) == (kind == "ema")


def test_card_has_valid_front_matter_and_names_no_folders(run: Path, lists: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    assert main(["convert", str(run), str(tmp_path / "hf"), "--to", "hf", "--weights", "ema"]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert (matter["library_name"], matter["pipeline_tag"]) == ("transformers", "video-classification")
    summary = json.loads((run / "evaluation-scored" / "summary.json").read_text())
    top1, top5 = summary["top1"], summary["top5"]
    for part in (
        "| recipe | demo_ft |", "| training list | few.csv |", "| validation list | scored.csv |", KEPT,
        f"top-1 {top1:.2%}, top-5 {top5:.2%} on 8 videos of scored.csv, 2 x 1 views; the model {KEPT}",
        "on scored.csv, one view in the middle of each video", "trust_remote_code=True", "torch ",
    ):  # fmt: skip
        assert part in text
    assert str(lists) not in card
    assert str(run.parent) not in card


def test_card_has_scores_of_the_exported_weights_alone(run: Path, tmp_path: Path) -> None:
    """All scores of this run belong to its average."""
    assert main(["convert", str(run), str(tmp_path / "hf"), "--to", "hf"]) == 0
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "None recorded." in text
    assert "top-1" not in text


def test_evaluation_and_prediction_say_the_keep_ratio(
    run: Path, lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, few = lists / "few.csv", ["--num-workers", "0", "--num-temporal", "1"]
    for extra, kept in ([], KEPT), (["--keep-ratio", "1"], "keeps all 288 tokens"):
        given = ["evaluate", str(run), "--list", str(videos), "--out", str(tmp_path / f"out{len(extra)}")]
        assert main([*given, *few, *extra]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("mean class accuracy"))
        assert kept in line
        assert main(["predict", str(run), str(read_list(videos)[0].path), *few, *extra]) == 0
        assert f"the model {kept}" in capsys.readouterr().out


def test_use_on_another_share_of_the_tokens_than_in_training_is_noted(
    run: Path, lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run, a file of weights and an exported folder record the share that they were trained with."""
    assert main(["convert", str(run), str(tmp_path / "w.safetensors"), "--to", "everest"]) == 0
    assert main(["convert", str(run), str(tmp_path / "hf"), "--to", "hf"]) == 0
    video = str(read_list(lists / "few.csv")[0].path)
    for source in (run, tmp_path / "w.safetensors", tmp_path / "hf"):
        given = ["predict", str(source), video, "--num-workers", "0", "--num-temporal", "1"]
        given += [] if source == run else ["--recipe", "demo_ft"]
        capsys.readouterr()
        assert main(given) == 0
        assert "trained with" not in capsys.readouterr().out
        assert main([*given, "--keep-ratio", "0.6"]) == 0
        assert "trained with keep_ratio=0.3 but used with 0.6, " in capsys.readouterr().out


def test_weights_without_a_run_take_the_selection_of_a_recipe(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = tmp_path / "w.pth"
    assert main(["convert", str(run), str(official), "--to", "videomae"]) == 0
    capsys.readouterr()
    assert main(["convert", str(official), str(tmp_path / "bare"), "--to", "hf"]) == 0
    assert "it is not known how many tokens of a clip the weights were trained on" in capsys.readouterr().out
    assert not (tmp_path / "bare" / "modeling_everest.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "bare" / "config.json").read_text())
    assert main(["convert", str(official), str(tmp_path / "hf"), "--to", "hf", "--recipe", "demo_ft"]) == 0
    assert KEPT in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["everest"]["num_kept"] == 86
    for source, layout, message in (
        (run, "hf", "--recipe demo_ft has no effect"),
        (official, "everest", "--recipe demo_ft has no effect with --to everest"),
    ):
        given = ["convert", str(source), str(tmp_path / "x"), "--to", layout, "--recipe", "demo_ft"]
        assert message in refused(given, capsys)


def test_average_of_what_keeps_none_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, copy = tmp_path / "w.safetensors", tmp_path / "run"
    assert main(["convert", str(run), str(file), "--to", "everest"]) == 0
    shutil.copytree(run, copy)
    (average,) = copy.rglob(AVERAGE)
    average.unlink()
    (average.parent / SEAL).unlink()
    seal(average.parent, ALONE)
    cases = [
        (file, "everest", "only runs and checkpoints have an average"),
        (copy, "everest", f"has no {AVERAGE}: the run was trained without optim.ema_decay"),
        (run, "deepspeed-fp32", "--weights ema cannot be written with --to deepspeed-fp32; use --to everest"),
    ]
    for source, layout, message in cases:
        given = ["convert", str(source), str(tmp_path / "x.safetensors"), "--to", layout, "--weights", "ema"]
        assert message in refused(given, capsys)


def test_a_file_of_ours_carries_the_selection_of_its_run_along(run: Path, tmp_path: Path) -> None:
    for layout, name in (("everest", "a"), ("deepspeed-fp32", "b")):
        file = tmp_path / f"{name}.safetensors"
        assert main(["convert", str(run), str(file), "--to", layout]) == 0
        assert main(["convert", str(file), str(tmp_path / name), "--to", "hf"]) == 0
        assert json.loads((tmp_path / name / "config.json").read_text())["everest"]["keep_ratio"] == 0.3


def test_file_whose_run_cannot_be_read_is_exported_and_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The configuration is of another version; a recipe can replace it."""
    file, older = tmp_path / "a.safetensors", tmp_path / "older.safetensors"
    assert main(["convert", str(run), str(file), "--to", "everest"]) == 0
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() | {"config": '{"task": "finetune", "unknown": 1}'}
    save_file(load_file(file), older, metadata)
    capsys.readouterr()
    assert main(["convert", str(older), str(tmp_path / "a"), "--to", "hf"]) == 0
    said = capsys.readouterr().out
    unreadable = "the run's configuration that came with the weights cannot be used"
    assert f"{unreadable}: the configuration of their run: unknown key" in said
    assert "--recipe NAME adds the recipe's selection to the folder" in said
    assert main(["convert", str(older), str(tmp_path / "b"), "--to", "hf", "--recipe", "demo_ft"]) == 0
    assert "These are the settings of the recipe" in (tmp_path / "b" / "README.md").read_text()


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_mode_that_the_umask_gives(run: Path, umask: int, tmp_path: Path) -> None:
    targets = {"everest": "a.safetensors", "deepspeed-fp32": "b.safetensors", "videomae": "c.pth", "hf": "d"}
    for layout, name in targets.items():
        assert main(["convert", str(run), str(tmp_path / "new" / name), "--to", layout]) == 0
    files = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    assert len(files) == 3 + 7
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_files_of_a_run_have_the_mode_that_the_umask_gives(run: Path) -> None:
    """The average, which is a safetensors file, is included."""
    current = os.umask(0o022)
    os.umask(current)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in run.rglob("*") if path.is_file()}
    assert AVERAGE in modes
    assert set(modes.values()) == {0o666 & ~current}


@pytest.fixture(scope="module")
def diverged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with NaN in the weights and in the average of its sealed checkpoint."""
    copy = tmp_path_factory.mktemp("diverged") / "run"
    shutil.copytree(run, copy)
    (checkpoint,) = (path for path in (copy / "checkpoints").iterdir() if path.is_dir())
    states = torch.load(checkpoint / STATES, weights_only=False)
    states["module"]["model.head.bias"][0] = float("nan")
    torch.save(states, checkpoint / STATES)
    average = load_file(checkpoint / AVERAGE)
    average["head.bias"][0] = float("inf")
    save_file(average, checkpoint / AVERAGE)
    (checkpoint / SEAL).unlink()
    seal(checkpoint, ALONE)
    return copy


@pytest.mark.parametrize(
    "given",
    [
        "convert RUN OUT --to hf",
        "convert RUN OUT --to hf --weights ema",
        "convert RUN OUT.safetensors --to everest",
        "convert RUN OUT.pth --to videomae",
        "convert RUN OUT.safetensors --to deepspeed-fp32",
        "predict RUN VIDEO",
        "predict RUN VIDEO --weights model",
        "predict RUN VIDEO --features OUT.safetensors",
        "evaluate RUN --list LIST --out OUT",
    ],
)
def test_run_that_diverged_is_refused_by_every_command(
    given: str, diverged: Path, lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": diverged, "LIST": lists / "few.csv", "VIDEO": read_list(lists / "few.csv")[0].path}
    places |= {f"OUT{suffix}": tmp_path / f"out{suffix}" for suffix in ("", ".pth", ".safetensors")}
    assert "head.bias has 1 NaN" in refused([str(places.get(word, word)) for word in given.split()], capsys)
    assert not list(tmp_path.iterdir())


def test_run_does_not_start_from_one_that_diverged(diverged: Path, lists: Path, tmp_path: Path) -> None:
    done = compute(words(lists, tmp_path / "new", "--init-from", str(diverged)))
    assert done.returncode == 2
    assert "head.bias has 1 NaN" in done.stderr
    assert not (tmp_path / "new").exists()


def test_average_that_diverged_is_refused_though_the_weights_are_sound(
    run: Path, diverged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (there,) = diverged.rglob(AVERAGE)
    (here,) = copy.rglob(AVERAGE)
    shutil.copy(there, here)
    (here.parent / SEAL).unlink()
    seal(here.parent, ALONE)
    said = refused(["convert", str(copy), str(tmp_path / "hf"), "--to", "hf", "--weights", "ema"], capsys)
    assert f"{AVERAGE}: head.bias has 0 NaN and 1 infinite" in said
    assert main(["convert", str(copy), str(tmp_path / "hf"), "--to", "hf"]) == 0


def test_finished_run_that_is_to_train_longer_names_the_way(run: Path, lists: Path) -> None:
    longer = compute(words(lists, run, "--optim.epochs", "3"))
    assert longer.returncode == 2
    assert "optim.epochs was 1 and is now 3" in longer.stderr
    assert f"start a new run: --init-from {run} --out ANOTHER" in " ".join(longer.stderr.split())
    again = compute(words(lists, run))
    assert again.returncode == 0, again.stderr
    assert (
        f"nothing left to do: step 2 of 2; to train longer, start a new run from these weights: --init-from {run}"
        in (again.stdout)
    )


@pytest.mark.slow
def test_way_that_is_named_trains_on_from_the_weights(run: Path, lists: Path, tmp_path: Path) -> None:
    done = compute(words(lists, tmp_path / "more", "--init-from", str(run), "--optim.epochs", "2"))
    assert done.returncode == 0, done.stderr
    assert "left fresh    none" in done.stdout


@pytest.mark.parametrize(
    "given",
    [
        ["--local_rank=0", "pretrain", "demo"],
        ["--local_rank", "0", "pretrain", "demo"],
        ["--local-rank=1", "finetune", "demo_ft"],
        ["pretrain", "demo", "--local_rank=1"],
        ["evaluate", "run", "--local_rank", "1"],
    ],
    ids=" ".join,
)
def test_local_rank_of_a_launcher_names_its_flag(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(given, capsys)
    assert "start with `deepspeed --no_local_rank --module everest_ds ...`" in said


def test_local_rank_is_said_once_for_a_launch() -> None:
    """Two processes of one parent, with the arguments and variables of the deepspeed launcher."""
    ranks = []
    for rank in ("0", "1"):
        command = [sys.executable, "-m", "everest_ds", f"--local_rank={rank}", "pretrain", "demo"]
        environment = cpu_environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
        ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY))
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert "".join(said).count("start with `deepspeed --no_local_rank") == 1
