"""Export weights of a run and load them into another: bitwise the optimiser's float32 weights, at every stage."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from everest_ds import cli
from everest_ds.config.file import load_config
from everest_ds.errors import UserError
from everest_ds.tokens import TokenGrid
from everest_ds.train.checkpoints.consolidated import ALONE, load_initial_weights
from everest_ds.train.checkpoints.run_dir import Resume
from everest_ds.train.checkpoints.save import TrainState
from everest_ds.train.checkpoints.start import choose_start
from everest_ds.train.tasks import build_autoencoder
from tests.conftest import REPOSITORY
from tests.integration.launch import compute, contents, ds_config, flags
from tests.integration.scanning import scan

# A folder, and the figures of each case.
Exported = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A run of every stage and precision with its exported weights, and the figures of each."""
    out = tmp_path_factory.mktemp("exported")
    return out, scan("exports", REPOSITORY / "ds_configs", out, processes=2)


def test_export_equals_the_live_weights_bit_for_bit_from_every_stage(exported: Exported) -> None:
    out, seen = exported
    num_tensors = len(build_autoencoder(load_config(out / "zero2_fp32" / "config.json")).state_dict())
    assert [(one["stage"], one["precision"]) for one in seen] == [
        (s, p) for s in range(4) for p in ("fp32", "bf16")
    ]
    assert [one["num_tensors"] for one in seen] == [num_tensors] * 8
    assert all(one["is_live"] for one in seen)
    assert not any(one["is_bf16"] for one in seen)


def test_convert_writes_weights_that_the_model_takes_and_says_where_they_are_from(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = exported[0] / "zero3_bf16"
    target = tmp_path / "new folder" / "model.safetensors"
    assert cli.main(["convert", str(run_dir), str(target), "--to", "deepspeed-fp32"]) == 0
    assert f"float32 weights of {run_dir}/checkpoints/step-00000002 -> {target}" in capsys.readouterr().out
    build_autoencoder(load_config(run_dir / "config.json")).load_state_dict(load_file(target))
    with safe_open(target, "pt") as file:
        assert file.metadata()["step"] == "2"
        assert '"recipe": "demo"' in file.metadata()["config"]
    with pytest.raises(SystemExit):
        cli.main(["convert", str(run_dir), str(target)])  # --to is not given


def test_convert_refuses_what_it_cannot_read_or_would_overwrite(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = exported[0] / "zero2_fp32"
    broken = tmp_path / "broken"
    shutil.copytree(run_dir, broken)
    next((broken / "checkpoints" / "step-00000002").glob("*optim_states.pt")).write_bytes(b"short")
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    cases = [
        ((tmp_path, "x.safetensors"), "is neither a run directory nor a complete checkpoint"),
        ((run_dir, "x.pt"), "must end in .safetensors"),
        ((run_dir, "there.safetensors"), "exists; remove it or name another file"),
        ((broken, "x.safetensors"), "is damaged: "),
    ]
    for (source, target), message in cases:
        assert cli.main(["convert", str(source), str(tmp_path / target), "--to", "deepspeed-fp32"]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
    assert not (tmp_path / "x.safetensors").exists()


def test_run_starts_from_weights_alone_and_a_repeated_command_goes_on(
    exported: Exported, demo_folder: Path, tmp_path: Path
) -> None:
    """Load weights of a ZeRO-3 run in one process at ZeRO-0; optimiser, step and order start from the beginning."""
    weights, run_dir = exported[0] / "zero3_fp32.safetensors", tmp_path / "run"
    words = ["--ds-config", ds_config("zero0"), "--init-from", str(weights), "--optim.warmup-epochs", "4"]
    one_step = flags(demo_folder, run_dir, *words, steps=1)  # at rate zero: the weights stay
    done = compute(one_step)
    assert done.returncode == 0, done.stderr
    assert f"weights from {weights}, everything else fresh" in done.stdout
    saved = torch.load(
        run_dir / "checkpoints" / "step-00000001" / "mp_rank_00_model_states.pt", weights_only=False
    )["module"]
    given = load_file(weights)
    assert {name.removeprefix("model.") for name in saved} == given.keys()
    assert all(torch.equal(tensor, given[name.removeprefix("model.")]) for name, tensor in saved.items())
    again = compute(flags(demo_folder, run_dir, *words, steps=2))
    assert "(--init-from has an effect only at the start of a run)" in again.stdout
    before = contents(run_dir)
    both = compute([*flags(demo_folder, run_dir, *words, steps=3), "--resume", str(run_dir)])
    assert both.returncode == 2
    assert "--init-from starts a new run from weights alone, --resume PATH continues a run" in both.stderr
    assert contents(run_dir) == before


def test_weights_of_another_model_are_refused_with_both_shapes(
    exported: Exported, demo_folder: Path, tmp_path: Path
) -> None:
    words = ["--ds-config", ds_config("zero0"), "--init-from", str(exported[0] / "zero1_bf16")]
    words += ["--model.patch-size", "16"]
    done = compute(flags(demo_folder, tmp_path / "run", *words))
    assert done.returncode == 2
    assert "encoder.patch_embed.proj.weight has shape (128, 3, 2, 8, 8), this model's has" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("layout", "name"), [("everest", "m.safetensors"), ("videomae", "m.pth"), ("hf", "m")])
def test_run_is_converted_and_read_again_bit_for_bit(
    exported: Exported,
    layout: str,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir, target = exported[0] / "zero3_bf16", tmp_path / name
    assert cli.main(["convert", str(run_dir), str(target), "--to", layout]) == 0
    shown = capsys.readouterr().out
    assert f"weights of {run_dir}/checkpoints/step-00000002: a pre-training model, ViT-tiny, width 128" in shown
    assert "loaded        88 of 88 tensors" in shown
    theirs = "videomae.encoder.layer.N.attention.attention.q_bias" if layout == "hf" else "as it was"
    assert any(line.split() == ["encoder.blocks.N.attn.q_bias", *theirs.split()] for line in shown.splitlines())
    config = load_config(run_dir / "config.json")
    model = build_autoencoder(config)
    report = load_initial_weights(model, target, clip_grid=config.grid)
    assert (report.fresh, report.ignored, report.interpolated) == ((), (), ())
    if layout == "everest":
        with safe_open(target, "pt") as file:
            assert '"recipe": "demo"' in file.metadata()["config"]
    expected = load_file(exported[0] / "zero3_bf16.safetensors")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    assert cli.main(["convert", str(run_dir), str(target), "--to", layout]) == 2
    assert "exists; remove it or name another" in capsys.readouterr().err


def test_official_code_finds_its_names_under_model(exported: Exported, tmp_path: Path) -> None:
    assert cli.main(["convert", str(exported[0] / "zero2_fp32"), str(tmp_path / "m.pth"), "--to", "videomae"]) == 0
    content = torch.load(tmp_path / "m.pth", weights_only=True)
    assert content["model"].keys() == load_file(exported[0] / "zero2_fp32.safetensors").keys()


def test_convert_refuses_before_it_writes(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, checkpoint = exported[0] / "zero0_fp32", exported[0] / "zero0_fp32" / "checkpoints" / "step-00000002"
    torn = tmp_path / "run" / "checkpoints" / "tmp-step-00000002"
    shutil.copytree(checkpoint, torn, ignore=shutil.ignore_patterns("complete.json"))
    shutil.copy(run_dir / "config.json", tmp_path / "run")
    state = load_file(exported[0] / "zero0_fp32.safetensors")
    torch.save({"model": {**state, "encoder.pos_embed": torch.zeros(1)}}, tmp_path / "more.pth")
    torch.save({"model": {name: state[name] for name in state if name != "mask_token"}}, tmp_path / "less.pth")
    cases = [
        (run_dir, "w.pth", "everest", "must end in .safetensors"),
        (run_dir, "w.safetensors", "videomae", "must end in .pth or .pt"),
        (run_dir, "w.pth", "hf", "a Hugging Face model is a folder"),
        (torn, "w", "hf", "is neither a run directory nor a complete checkpoint"),
        (
            tmp_path / "more.pth",
            "w",
            "hf",
            "has encoder.pos_embed, which the model does not; to leave that out, use --allow",
        ),
        (tmp_path / "less.pth", "w", "hf", "lacks mask_token; expected every tensor of the model"),
        (tmp_path / "none", "w", "hf", "does not exist"),
    ]
    for source, target, layout, message in cases:
        assert cli.main(["convert", str(source), str(tmp_path / target), "--to", layout]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / target).exists()
    words = [
        "convert",
        str(tmp_path / "more.pth"),
        str(tmp_path / "w"),
        "--to",
        "hf",
        "--allow",
        "encoder.pos_embed",
    ]
    assert cli.main(words) == 0
    assert "ignored       encoder.pos_embed" in capsys.readouterr().out


def test_run_starts_from_a_folder_of_hugging_face_with_interpolated_positions(
    exported: Exported, demo_folder: Path, tmp_path: Path
) -> None:
    """The clips have half the frames; the configuration records where positions are from, for resuming."""
    folder, run_dir = tmp_path / "hf", tmp_path / "run"
    assert cli.main(["convert", str(exported[0] / "zero1_fp32"), str(folder), "--to", "hf"]) == 0
    config = load_config(exported[0] / "zero1_fp32" / "config.json")
    shorter = replace(config, data=replace(config.data, num_frames=8))
    with pytest.raises(UserError, match="positions for 8x6x6 tokens, this model for 4x6x6") as refused:
        load_initial_weights(build_autoencoder(shorter), folder)
    way_out = str(refused.value).split("To interpolate, use ")[1].split(";")[0].split()
    assert way_out == ["--model.position-frames", "16", "--model.position-size", "48"]
    words = ["--ds-config", ds_config("zero0"), "--init-from", str(folder), "--data.num-frames", "8"]
    done = compute(flags(demo_folder, run_dir, *words, *way_out, steps=1), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("interpolated  positions 8x6x6 -> 4x6x6 tokens") == 1  # by rank zero alone
    assert done.stdout.count("loaded        88 of 88 tensors") == 1
    config = load_config(run_dir / "config.json")
    assert build_autoencoder(config).encoder.grid == TokenGrid(time=8, rows=6, cols=6)
    assert config.grid == TokenGrid(time=4, rows=6, cols=6)


def test_allowing_without_weights_is_refused(tmp_path: Path) -> None:
    now = TrainState(world_size=1, zero_stage=0, dtype="float32", videos="")
    with pytest.raises(UserError, match="--init-allow decoder has no effect without --init-from"):
        choose_start(Resume(run_dir=tmp_path), now, ALONE, None, ("decoder",))
