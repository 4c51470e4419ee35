"""Exported classifiers in transformers with `trust_remote_code`: same tokens, frames and logits as the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everest_ds.cli import main
from everest_ds.config import FinetuneConfig
from everest_ds.config.file import dump_config
from everest_ds.data.clips.views import crop_origins, dense_clips, resize_shorter_side, segment_clips
from everest_ds.data.readers.choice import choose_reader
from everest_ds.errors import UserError
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.selection import keep_rule
from everest_ds.model.sizes import get_size
from everest_ds.model.tubelets import standardise
from everest_ds.model.weights.export import write_weights
from everest_ds.model.weights.reading import read_weights, weights_of_run
from everest_ds.recipes import get_recipe
from everest_ds.train.checkpoints.consolidated import metadata_of_run
from everest_ds.train.tasks import encoder_options

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[hf])")
pytestmark = pytest.mark.parity

# Largest difference of a logit of about 2. Worst case seen, transformers 5.18 and 5.24, torch 2.14 on a CPU: 1e-6.
ATOL = 1e-5
# Using all tokens instead of 0.6 of them changes the logits by at least this much; measured: 0.2 to 1.
MOVED = 1e-2
# Of probabilities, torchcodec's frames there and PyAV's here. Worst case seen on 40 real MP4, WebM and Matroska
# files: 5e-7. Five AVI files differ by up to 2e-2, because torchcodec returns other frames.
PIPELINE_ATOL = 1e-5
NAMES = tuple(f"class {i}" for i in range(7))


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Transformers copies a folder's code into a cache and imports it from there; each test has its own cache."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def recipe(position_frames: int | None = None, **selection: Any) -> FinetuneConfig:
    config = get_recipe("demo_ft")
    assert isinstance(config, FinetuneConfig)
    return replace(
        config,
        selection=replace(config.selection, **selection),
        model=replace(config.model, position_frames=position_frames),
    )


def model_of(config: FinetuneConfig) -> EverestClassifier:
    """A random model with effective biases and norms and clearly different logits."""
    torch.manual_seed(0)
    options = {"num_classes": len(NAMES), "head_init_scale": 10.0}
    model = EverestClassifier(get_size(config.model.size), config.position_grid, encoder_options(config), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.rule = keep_rule(config.selection)
    return model.eval()


def export(config: FinetuneConfig, folder: Path) -> EverestClassifier:
    model = model_of(config)
    text = json.dumps(json.loads(dump_config(config)))
    weights = weights_of_run(model.state_dict(), metadata_of_run(config, NAMES), "memory", config=text)
    write_weights(weights, folder, "hf")
    return model


def clips_with_ties() -> Tensor:
    """Noise, noise that stops changing, and a still image, whose tokens all tie."""
    draw = torch.Generator().manual_seed(1)
    clips = torch.randint(0, 256, (4, 3, 16, 48, 48), dtype=torch.uint8, generator=draw)
    clips[1, :, 5:] = clips[1, :, 4:5]
    clips[2] = clips[2, :, :1]
    return clips


@torch.no_grad()
def logits_of(model: Any, clips: Tensor) -> Tensor:
    return model(standardise(clips).transpose(1, 2)).logits


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForVideoClassification.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize(
    "selection",
    [
        {"keep_ratio": 0.6},
        {"keep_ratio": 0.3},
        {"keep_ratio": 1.0},
        {"keep_ratio": 0.6, "order": "ascending"},
        {"keep_ratio": 0.45, "distance": "l1"},
        {"keep_ratio": 0.45, "distance": "cosine"},
        {"keep_ratio": 0.45, "distance": "cka"},
        {"keep_ratio": 0.5, "strategy": "random"},
        {"keep_ratio": 0.5, "strategy": "tube"},
        {"keep_ratio": 0.5, "strategy": "running_cell"},
        {"keep_ratio": 1.0, "strategy": "all"},
        {"keep_ratio": 0.6, "position_frames": 32},
    ],
    ids=lambda selection: "-".join(map(str, selection.values())),
)
def test_trusted_code_gives_the_logits_of_the_run(selection: dict[str, Any], tmp_path: Path) -> None:
    model, clips = export(recipe(**selection), tmp_path / "hf"), clips_with_ties()
    with torch.no_grad():
        expected = model(clips)
    theirs = load(tmp_path / "hf", trust_remote_code=True)
    worst = float((logits_of(theirs, clips) - expected).abs().max())
    print(f"MEASURED {selection}: {worst:.1e}")
    assert worst < ATOL
    one_by_one = torch.cat([logits_of(theirs, clip[None]) for clip in clips])
    assert float((one_by_one - expected).abs().max()) < ATOL
    assert theirs.fc_norm.eps == model.fc_norm.eps


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}])
def test_plain_transformers_loads_the_folder_unasked_and_uses_all_tokens(
    trust: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(_: str = "") -> str:
        raise AssertionError("transformers asks whether to run the folder's code")

    monkeypatch.setattr("builtins.input", ask)
    model, clips = export(recipe(keep_ratio=0.6), tmp_path / "hf"), clips_with_ties()
    theirs = load(tmp_path / "hf", **trust)
    assert type(theirs) is transformers.VideoMAEForVideoClassification
    theirs.fc_norm.eps = model.fc_norm.eps  # what else differs
    with torch.no_grad():
        kept = model(clips)
        model.rule = keep_rule(recipe(keep_ratio=1.0).selection)
        everything = model(clips)
    assert float((logits_of(theirs, clips) - everything).abs().max()) < ATOL
    assert float((everything - kept).abs().max()) > MOVED


def test_trusted_code_trains_and_computes_its_loss(tmp_path: Path) -> None:
    export(recipe(keep_ratio=0.6), tmp_path / "hf")
    theirs, clips = load(tmp_path / "hf", trust_remote_code=True), clips_with_ties()
    output = theirs(standardise(clips).transpose(1, 2), labels=torch.tensor([0, 1, 2, 3]))
    output.loss.backward()
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 2, 3]))
    assert torch.allclose(output.loss, expected)
    assert all(parameter.grad is not None for parameter in theirs.parameters())


def test_trusted_code_refuses_clips_of_another_length(tmp_path: Path) -> None:
    export(recipe(keep_ratio=0.6), tmp_path / "hf")
    theirs = load(tmp_path / "hf", trust_remote_code=True)
    with pytest.raises(ValueError, match="expected clips of 16 frames, got 8"):
        theirs(torch.zeros(1, 8, 3, 48, 48))


def test_exported_folder_is_read_back_as_the_same_model(tmp_path: Path) -> None:
    """Positions are made for 32 frames, clips have 16; the last norm is this project's."""
    config = recipe(keep_ratio=0.6, position_frames=32)
    model = export(config, tmp_path / "hf")
    back = read_weights(tmp_path / "hf")
    assert back.architecture.grid == config.position_grid
    assert back.architecture.last_norm_eps == model.fc_norm.eps
    assert back.architecture.labels == NAMES
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_trusted_model_is_saved_with_its_code(tmp_path: Path) -> None:
    model, clips = export(recipe(keep_ratio=0.6), tmp_path / "hf"), clips_with_ties()
    load(tmp_path / "hf", trust_remote_code=True).save_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = model(clips)
    found = logits_of(load(tmp_path / "again", trust_remote_code=True), clips)
    assert float((found - expected).abs().max()) < ATOL


@pytest.mark.parametrize(
    "block",
    [[], {"last_norm_eps": "small"}, {"last_norm_eps": 1e-6, "position_grid": [8, 6]}, {"last_norm_eps": 0.0}],
)
def test_block_of_config_that_was_edited_is_refused(block: Any, tmp_path: Path) -> None:
    export(recipe(keep_ratio=0.6), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "everest": block}))
    with pytest.raises(UserError, match=r"the block everest of config\.json was not written by `everest convert`"):
        read_weights(tmp_path / "hf")


def middle_view(processor: Any, num_frames: int) -> list[int]:
    class Metadata:
        total_num_frames = num_frames

    return [int(frame) for frame in processor.sample_frames(Metadata)]


def test_trusted_processor_takes_the_frames_of_the_middle_view(tmp_path: Path) -> None:
    config = recipe()
    for sampling in ("dense", "segment"):
        folder = tmp_path / sampling
        export(replace(config, data=replace(config.data, sampling=sampling, sampling_stride=3)), folder)
        processor = transformers.AutoVideoProcessor.from_pretrained(folder, trust_remote_code=True)
        for num_frames in (1, 7, 16, 30, 47, 48, 49, 300):
            (expected,) = (
                dense_clips(num_frames, 16, 3, 1) if sampling == "dense" else segment_clips(num_frames, 16, 1)
            )
            assert middle_view(processor, num_frames) == expected


@pytest.mark.parametrize("size", [(48, 48), (64, 48), (49, 84), (101, 77)])
def test_trusted_processor_scales_and_crops_as_the_middle_view(size: tuple[int, int], tmp_path: Path) -> None:
    export(recipe(), tmp_path / "hf")
    processor = transformers.AutoVideoProcessor.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    frames = torch.randint(0, 256, (16, 3, *size), dtype=torch.uint8)
    resized = resize_shorter_side(frames, 48)
    ((top, left),) = crop_origins(*resized.shape[2:], 48, 1)
    expected = standardise(resized[None, :, :, top : top + 48, left : left + 48].transpose(1, 2)).transpose(1, 2)
    found = processor(frames, return_tensors="pt", do_sample_frames=False)["pixel_values"]
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < ATOL


def require_torchcodec() -> None:
    try:
        import torchcodec  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(
            f"transformers decodes videos with torchcodec, which cannot be used: {str(error).splitlines()[0]}"
        )


def labels_of(classify: Any, video: Path) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in classify(str(video), top_k=len(NAMES))}


def predictions_of(run: Path, video: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    words = ["predict", str(run), str(video), "--recipe", "demo_ft", "--json", "--top", str(len(NAMES))]
    words += ["--keep-ratio", "0.6", "--num-temporal", "1", "--num-spatial", "1", "--num-workers", "0"]
    capsys.readouterr()
    assert main([*words, "--reader", "pyav"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return {entry["name"]: entry["probability"] for entry in json.loads(line)["predictions"]}


def test_pipeline_labels_a_video_as_predict_does(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_torchcodec()
    check_pipeline([demo_folder / "train" / "00000.mp4"], tmp_path, capsys)


def test_pipeline_labels_real_clips_as_predict_does(
    real_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_torchcodec()
    names = (
        "Video-LLaMA__boat.mp4",
        "learning-area__rabbit320.webm",
        "sample-videos__book.mkv",
    )
    check_pipeline([real_clips / name for name in names], tmp_path, capsys)


def check_pipeline(videos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the folder's code the pipeline gives the probabilities of `everest predict`; without it, just labels."""
    choose_reader("pyav")
    export(recipe(keep_ratio=0.6), tmp_path / "hf")
    trusting = transformers.pipeline("video-classification", str(tmp_path / "hf"), trust_remote_code=True)
    plain = transformers.pipeline("video-classification", str(tmp_path / "hf"))
    for video in videos:
        expected, found = predictions_of(tmp_path / "hf", video, capsys), labels_of(trusting, video)
        assert found.keys() == expected.keys() == set(NAMES)
        worst = max(abs(found[name] - expected[name]) for name in NAMES)
        print(f"MEASURED {video.name}: {worst:.1e}")
        assert worst < PIPELINE_ATOL
        assert labels_of(plain, video).keys() == set(NAMES)
