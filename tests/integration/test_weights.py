"""Weights out of a run and into another: float32, bit for bit what the optimiser holds, from every stage."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from everest_ds import cli
from everest_ds.config_file import load_config
from everest_ds.train.tasks import build_autoencoder
from tests.conftest import REPOSITORY
from tests.integration.launch import BIN, contents, cpu_environment, ds_config, flags, free_port, launch

TRAIN_AND_EXPORT = """
import os, sys, torch
from dataclasses import replace
from pathlib import Path
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file
from everest_ds import distributed
from everest_ds.config import BatchConfig
from everest_ds.distributed import World
from everest_ds.recipes import get_recipe
from everest_ds.train import engine as engines
from everest_ds.train.checkpoint import TrainState, save_checkpoint
from everest_ds.train.consolidated import export_fp32
from everest_ds.train.run_dir import write_run_files
from everest_ds.train.tasks import PretrainTask

ds_configs, out = map(Path, sys.argv[1:])
world = World.from_environment()
device = distributed.start(world)
config = replace(get_recipe("demo"), batch=BatchConfig(global_size=2, micro_size=1))

def live_weights(engine, stage, precision):
    names = {p: name.removeprefix("model.") for name, p in engine.module.named_parameters()}
    if stage:
        return {name: safe_get_full_fp32_param(p) for p, name in names.items()}
    if precision == "fp32":
        return {name: p.detach() for p, name in names.items()}
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups)
    return {names[low]: full for lows, fulls in pairs for low, full in zip(lows, fulls)}

for stage in range(4):
    for precision in ("fp32", "bf16"):
        systems = engines.load_systems(ds_configs / f"zero{stage}.json")
        ds_config = engines.resolve_ds_config(systems, config, world_size=2, precision=precision, device_type="cpu")
        torch.manual_seed(0)
        engine = engines.build_engine(PretrainTask(config), config, ds_config, device)
        engines.set_learning_rate(engine, 1e-3)
        for step in range(2):
            draw = torch.Generator().manual_seed(2 * step + world.rank)
            clips = torch.randint(0, 256, (1, 3, 16, 48, 48), dtype=torch.uint8, generator=draw)
            engine.backward(engine(clips, torch.rand(1, config.num_selected, generator=draw)))
            assert engines.step(engine).applied
        run_dir = out / f"zero{stage}_{precision}"
        dtype = "bfloat16" if precision == "bf16" else "float32"
        state = TrainState(step=2, world_size=2, zero_stage=stage, dtype=dtype, videos="")
        save_checkpoint(engine, run_dir, state, world)
        live = live_weights(engine, stage, precision)  # a collective: all ranks
        if world.is_main:
            write_run_files(run_dir, config, ds_config)
            export_fp32(run_dir, out / f"{run_dir.name}.safetensors")
            written = load_file(out / f"{run_dir.name}.safetensors")
            same = written.keys() == live.keys() and all(torch.equal(written[name], live[name]) for name in live)
            rounded = all(torch.equal(w, w.bfloat16().float()) for w in written.values())
            print("EXPORT", stage, precision, len(written), same, rounded, flush=True)
        distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("exported")
    (out / "script.py").write_text(TRAIN_AND_EXPORT)
    words = ["--no_local_rank", "--num_gpus", "2", "--master_port", str(free_port()), str(out / "script.py")]
    done = subprocess.run(
        [str(BIN / "deepspeed"), *words, str(REPOSITORY / "ds_configs"), str(out)],
        capture_output=True, text=True, timeout=300, env=cpu_environment(PYTHONPATH=str(REPOSITORY)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, [line for line in done.stdout.splitlines() if line.startswith("EXPORT")]


def test_export_equals_the_live_weights_bit_for_bit_from_every_stage(exported: tuple[Path, list[str]]) -> None:
    """The last column: none is a bfloat16 number written as float32."""
    _, lines = exported
    num_tensors = len(build_autoencoder(load_config(exported[0] / "zero2_fp32" / "config.json")).state_dict())
    expected = [f"EXPORT {s} {p} {num_tensors} True False" for s in range(4) for p in ("fp32", "bf16")]
    assert lines == expected


def test_convert_writes_weights_that_the_model_takes_and_says_where_they_are_from(
    exported: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    exported: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    exported: tuple[Path, list[str]], demo_folder: Path, tmp_path: Path
) -> None:
    """Weights of a ZeRO-3 run go into one process at ZeRO-0; the optimiser, the step and the order start afresh."""
    weights, run_dir = exported[0] / "zero3_fp32.safetensors", tmp_path / "run"
    words = ["--ds-config", ds_config("zero0"), "--init-from", str(weights), "--optim.warmup-epochs", "4"]
    one_step = flags(demo_folder, run_dir, *words, steps=1)  # of learning rate zero: the weights stay
    done = launch(one_step)
    assert done.returncode == 0, done.stderr
    assert f"weights from {weights}, everything else fresh" in done.stdout
    saved = torch.load(
        run_dir / "checkpoints" / "step-00000001" / "mp_rank_00_model_states.pt", weights_only=False
    )["module"]
    given = load_file(weights)
    assert {name.removeprefix("model.") for name in saved} == given.keys()
    assert all(torch.equal(tensor, given[name.removeprefix("model.")]) for name, tensor in saved.items())
    again = launch(flags(demo_folder, run_dir, *words, steps=2))
    assert "(--init-from counts at the start of a run only)" in again.stdout
    before = contents(run_dir)
    both = launch([*flags(demo_folder, run_dir, *words, steps=3), "--resume", str(run_dir)])
    assert both.returncode == 2
    assert "--init-from starts a new run from weights alone, --resume PATH goes on with a run" in both.stderr
    assert contents(run_dir) == before


def test_weights_of_another_model_are_refused_with_both_shapes(
    exported: tuple[Path, list[str]], demo_folder: Path, tmp_path: Path
) -> None:
    words = ["--ds-config", ds_config("zero0"), "--init-from", str(exported[0] / "zero1_bf16")]
    words += ["--model.patch-size", "16"]
    done = launch(flags(demo_folder, tmp_path / "run", *words))
    assert done.returncode == 2
    assert "encoder.patch_embed.proj.weight has shape (128, 3, 2, 8, 8), this model's has" in done.stderr
    assert not (tmp_path / "run").exists()
