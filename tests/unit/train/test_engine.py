from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from everest_ds.errors import UserError
from everest_ds.recipes import get_recipe
from everest_ds.train.engine import DEFAULT_SYSTEMS, check_sections, load_systems, resolve_ds_config, zero_stage
from tests.conftest import REPOSITORY

FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))


def test_there_is_a_file_for_every_way_of_sharding() -> None:
    assert [path.stem for path in FILES] == ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_holds_systems_only_and_deepspeed_knows_its_options(path: Path) -> None:
    systems = load_systems(path)
    check_sections(systems, str(path))
    assert zero_stage(systems) == int(path.stem.removeprefix("zero")[0])
    assert systems["bf16"] == {"enabled": True}


def test_every_semantic_setting_is_written_out() -> None:
    config = get_recipe("k400_vit_l")
    resolved = resolve_ds_config(
        load_systems(REPOSITORY / "ds_configs" / "zero2.json"),
        config,
        world_size=4,
        precision="auto",
        device_type="cuda",
    )
    expected = {
        "train_batch_size": 512,
        "train_micro_batch_size_per_gpu": 64,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1.0
        "fp16": {"enabled": False},
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "communication_data_type": "bf16",
        "torch_autocast": {"enabled": False},
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_force_ds_cpu_optimizer": False,
    }
    assert {key: resolved[key] for key in expected} == expected
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}


def test_without_a_file_the_default_is_a_copy_of_plain_zero2() -> None:
    systems = load_systems(None)
    assert systems == {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}}
    systems["zero_optimization"]["stage"] = 3
    assert DEFAULT_SYSTEMS["zero_optimization"]["stage"] == 2


def test_unknown_zero_option_names_file_and_option(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_buket_size": 1}}))
    with pytest.raises(UserError, match=r"ds\.json: zero_optimization\.reduce_buket_size"):
        check_sections(load_systems(path), str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"zero_force_ds_cpu_optimizer": True},
            "zero_force_ds_cpu_optimizer=true needs DeepSpeed's CPU Adam op",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}},
            "offload_param.device=nvme needs DeepSpeed's async_io op",
        ),
    ],
)
def test_offload_without_its_op_is_refused(change: dict[str, object], message: str) -> None:
    systems = load_systems(REPOSITORY / "ds_configs" / "zero3_offload.json")
    check_sections(systems, "ds.json")
    with pytest.raises(UserError, match=message):
        check_sections(systems | change, "ds.json")


@pytest.mark.parametrize("key", ["bf16_master_weights_and_grads", "bf16_optimizer_states"])
def test_master_weights_in_bf16_are_refused_before_anything_is_built(key: str) -> None:
    systems = load_systems(REPOSITORY / "ds_configs" / "zero2.json")
    check_sections(systems | {"bf16": {"enabled": True, key: False}}, "ds.json")  # a key of DeepSpeed's
    with pytest.raises(UserError, match=rf"^ds\.json: bf16\..*{key}.* rounded away; remove both"):
        check_sections(systems | {"bf16": {"enabled": True, key: True}}, "ds.json")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("gradient_accumulation_steps", 2, "it is computed from batch.global_size"),
        ("torch_autocast", {"enabled": True}, "it is --precision autocast"),
    ],
)
def test_key_of_the_recipe_is_refused_with_the_reason(tmp_path: Path, key: str, value: object, reason: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}, key: value}))
    with pytest.raises(UserError, match=f"{key} does not belong in a DeepSpeed file: {reason}"):
        load_systems(path)


def test_start_of_a_training_loads_no_compiler_and_not_timm() -> None:
    """Runs in a new process. DeepSpeed decorates functions with torch.compile, which would load the compiler."""
    program = """
import sys
import torch
import everest_ds.training_run.run
from everest_ds import distributed
from everest_ds.recipes import get_recipe
from everest_ds.train import engine, tasks

device = distributed.start(distributed.World.from_environment())
config = get_recipe("demo")
systems = engine.DEFAULT_SYSTEMS
ds_config = engine.resolve_ds_config(systems, config, world_size=1, precision="fp32", device_type="cpu")
engine.build_engine(tasks.make_task(config), config, ds_config, device)
muon = "deepspeed.runtime.zero.muon.original_muon"
heavy = ("torch._inductor.compile_fx", "torch._inductor.codecache", "timm", muon)
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1:] == ["['deepspeed.runtime.zero.muon.original_muon']"], done.stderr
