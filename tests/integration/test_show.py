"""`everest show` and `everest_ds.load`: pictures of weights, runs and recipes."""

from __future__ import annotations

import doctest
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import everest_ds
from everest_ds.cli import main
from everest_ds.config import FinetuneConfig
from everest_ds.config.file import dump_config
from everest_ds.data.lists.video_list import VideoRow, read_list
from everest_ds.errors import UserError
from everest_ds.inference.loaded import fresh_model, load_model
from everest_ds.inference.showing import picture_names
from everest_ds.model.weights.export import Layout, write_weights
from everest_ds.model.weights.reading import weights_of_run
from everest_ds.recipes import RECIPES, get_recipe
from everest_ds.train.checkpoints.consolidated import metadata_of_run
from everest_ds.train.checkpoints.origin import locate
from everest_ds.train.tasks import build_autoencoder, make_task
from tests.integration.test_bad_input import refused


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pre-training model of the demo's size: a bare file, one with its run's settings, and hf/."""
    folder, config = tmp_path_factory.mktemp("weights"), get_recipe("demo")
    torch.manual_seed(0)
    tensors = build_autoencoder(config).state_dict()  # type: ignore[arg-type]
    save_file(tensors, folder / "bare.safetensors")
    of_run = weights_of_run(
        tensors, metadata_of_run(config), "a run", config=json.dumps(json.loads(dump_config(config)))
    )
    layouts: list[tuple[str, Layout]] = [("weights.safetensors", "everest"), ("hf", "hf")]
    for name, layout in layouts:
        write_weights(of_run, folder / name, layout)
    return folder


@pytest.fixture(scope="module")
def videos(demo_folder: Path) -> list[Path]:
    return [row.path for row in read_list(demo_folder / "train.csv")[:3]]


def picture_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_recipe_is_drawn_with_a_fresh_embedding_that_it_names(
    videos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "demo", str(videos[0]), "--out", str(tmp_path / "new" / "folder")]) == 0
    assert "fresh embedding of seed 0" in capsys.readouterr().out
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name == f"{videos[0].stem}.png"
    assert picture_of(path).shape[1] < 1440


@pytest.mark.parametrize("recipe", ["demo", "demo_ft", "study"])
def test_fresh_embedding_is_that_of_a_runs_first_step(recipe: str) -> None:
    config, before = get_recipe(recipe), torch.get_rng_state()
    found = fresh_model(config).model.state_dict()
    assert torch.equal(before, torch.get_rng_state())
    if isinstance(config, FinetuneConfig):
        config = replace(config, data=replace(config.data, num_classes=2))
    torch.manual_seed(config.run.seed)
    trained = make_task(config).model.state_dict()
    for name, tensor in found.items():
        (full,) = (full for full in trained if full.removeprefix("encoder.") == name)
        assert torch.equal(trained[full], tensor), name


def test_weights_ratios_strategies_frames_and_moving_pictures(
    weights: Path, videos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["show", str(weights / "weights.safetensors"), str(videos[0]), "--out"]
    assert main([*start, str(tmp_path / "own")]) == 0
    assert "fresh" not in capsys.readouterr().out.replace("left fresh", "")
    assert main([*start, str(tmp_path / "ratios"), "--ratios", "0.1", "0.3", "0.6"]) == 0
    assert main([*start, str(tmp_path / "all"), "--compare", "--frames", "--gif", "--mp4"]) == 0
    name = videos[0].stem
    found = {path.name for path in (tmp_path / "all").iterdir()}
    assert found == {f"{name}.png", f"{name}-frames.png", f"{name}.gif", f"{name}.mp4"}
    own, ratios, compared = (picture_of(tmp_path / f / f"{name}.png") for f in ("own", "ratios", "all"))
    # Frames, importance, kept, reconstruction; three times kept; kept by four strategies.
    assert own.shape[0] < ratios.shape[0] < compared.shape[0]


def test_a_run_is_drawn_with_its_reconstruction(
    uninterrupted: dict[int, Path], videos: list[Path], tmp_path: Path
) -> None:
    loaded = load_model(locate(uninterrupted[2]))
    (choice,) = loaded.examine(loaded.read(videos[0])).choices
    assert choice.reconstruction_THWC is not None
    assert main(["show", str(uninterrupted[2]), str(videos[0]), "--out", str(tmp_path)]) == 0


def test_bad_videos_take_a_line_each_and_the_others_are_drawn(
    videos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, empty = tmp_path / "broken.mp4", tmp_path / "empty.mp4"
    broken.write_bytes(b"no video" * 100)
    empty.touch()
    twin = tmp_path / videos[1].name
    shutil.copy(videos[0], twin)
    given = ["show", "demo", *map(str, [broken, videos[1], empty, twin]), "--out", str(tmp_path / "out")]
    assert main(given) == 2
    _, *lines = capsys.readouterr().err.splitlines()  # the first line says what is loaded
    assert [line.split(":")[0] for line in lines] == [f"cannot read {broken}", f"cannot read {empty}"]
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {f"{videos[1].stem}.png", f"{videos[1].stem}-2.png"}
    assert main([*given, "--allow-unreadable"]) == 0
    assert main(["show", "demo", str(broken), "--out", str(tmp_path / "out"), "--allow-unreadable"]) == 2


def test_windows_of_a_list_are_drawn_with_times_of_the_video(videos: list[Path]) -> None:
    loaded = fresh_model(get_recipe("demo"))
    whole, window = loaded.read(videos[0]), loaded.read(VideoRow(videos[0], 0, start_s=0.2, end_s=9.0))
    assert whole.times_s[0] < 0.2 <= window.times_s[0]
    assert window.end_s == whole.end_s


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demoo", "VIDEO"], "did you mean 'demo'"),
        (["demo"], "show needs a video"),
        (["demo", "VIDEO", "--ratios", "0"], "--ratios 0 must be"),
        (["demo", "VIDEO", "--recipe", "demo"], "--recipe demo has no effect"),
        (["demo", "VIDEO", "--ratios", "0.00001"], "--ratios 1e-05"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    words: list[str], said: str, videos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(videos[0]) if word == "VIDEO" else word for word in words]
    assert said in refused(["show", *given, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_names_of_pictures_are_unique_and_short(tmp_path: Path) -> None:
    rows = [VideoRow(Path(folder) / name, -1) for folder in "ab" for name in ("x.mp4", f"{'é' * 120}.mp4")]
    names = picture_names(rows)
    assert names[0::2] == ["x", "x-2"]
    assert len(set(names)) == 4
    for name in names:
        (tmp_path / f".{name}-frames.png.partial").touch()


@pytest.mark.parametrize(
    ("name", "edge", "is_told"),
    [("bare.safetensors", 224, False), ("weights.safetensors", 48, True), ("hf", 48, False)],
)
def test_loading_takes_files_and_folders(
    name: str, edge: int, is_told: bool, weights: Path, videos: list[Path]
) -> None:
    """Clips come from the run's settings in the file, else from its positions; a bare file has neither."""
    loaded = everest_ds.load(weights / name)
    assert ("the weights have no settings for clips" in loaded.report) != is_told
    assert loaded.read(videos[0]).clip_CTHW.shape == (3, 16, edge, edge)
    assert loaded.draw(videos[0]).width > 0


def test_loading_a_classifier_gives_its_logits_and_draws_what_it_keeps(videos: list[Path], tmp_path: Path) -> None:
    config = get_recipe("demo_ft")
    assert isinstance(config, FinetuneConfig)
    task = make_task(replace(config, data=replace(config.data, num_classes=5)))
    save_file(task.model.state_dict(), tmp_path / "ft.safetensors")
    loaded = everest_ds.load(tmp_path / "ft.safetensors", recipe="demo_ft")
    clip = loaded.read(videos[0])
    assert loaded.model(clip.clip_CTHW[None]).shape == (1, 5)
    (choice,) = loaded.examine(clip).choices
    assert (len(choice.visible_S), len(choice.predicted_R)) == (86, 0)
    assert loaded.class_names == tuple("01234")


def test_loading_weights_whose_configuration_is_absurd_is_refused(weights: Path, tmp_path: Path) -> None:
    """A foreign file may ask for more frames than fit into memory."""
    with safe_open(weights / "weights.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for section, name, value in ("selection", "alpha", 1e9), ("data", "num_frames", 10**9):
        config = json.loads(metadata["config"])
        config[section][name] = value
        save_file(tensors, tmp_path / "w.safetensors", metadata | {"config": json.dumps(config)})
        with pytest.raises(UserError, match="tokens"):
            everest_ds.load(tmp_path / "w.safetensors")


def test_loading_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        everest_ds.load(tmp_path / "nothing")


def test_doctest_draws_a_picture(
    weights: Path, videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(weights / "weights.safetensors", "weights.safetensors")
    shutil.copy(videos[0], "video.mp4")
    (found,) = (test for test in doctest.DocTestFinder().find(everest_ds) if test.name == "everest_ds.load")
    assert len(found.examples) >= 5
    assert doctest.DocTestRunner().run(found).failed == 0
    assert picture_of(Path("picture.png")).shape[2] == 3


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import everest_ds, sys; print({'torch', 'numpy', 'matplotlib', 'PIL'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_recipe_has_a_fresh_embedding() -> None:
    for name in RECIPES:
        loaded = fresh_model(get_recipe(name))
        assert loaded.is_fresh and len(list(loaded.model.blocks)) == 0  # type: ignore[arg-type, union-attr]
