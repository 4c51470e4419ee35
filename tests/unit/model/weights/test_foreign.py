"""Weights files are read as data, in any wrapping, and no code in them is run."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from everest_ds.errors import UserError
from everest_ds.model.weights.foreign import DEEPSPEED_STATES, read_raw
from everest_ds.model.weights.reading import read_weights, require_complete
from tests.conftest import GoldenModel

WRAPS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "ordered": OrderedDict,
    "model": lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 9, "scaler": {}, "args": OPTIONS},
    "module": lambda state: {"module": OrderedDict(state), "ds_version": "0.19.8", "skipped_steps": 0},
    "state_dict": lambda state: {"state_dict": state},
}  # fmt: skip
OPTIONS = argparse.Namespace(num_frames=16, input_size=64, patch_size=(16, 16), output_dir="out")
PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone."]


def state_of(golden: GoldenModel, kind: str) -> dict[str, Tensor]:
    return {k.removeprefix(kind): v for k, v in golden.weights.items() if k.startswith(kind)}


def are_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", ["pretrain.", "finetune."])
def test_official_file_is_unwrapped(mini64: GoldenModel, wrap: str, kind: str, tmp_path: Path) -> None:
    state = state_of(mini64, kind)
    torch.save(WRAPS[wrap](state), tmp_path / "w.pth")
    weights, report = require_complete(read_weights(tmp_path / "w.pth"))
    assert are_same(weights.tensors, state)
    assert len(report.loaded) == len(state)
    beside = {"model": ("optimizer", "epoch", "scaler", "args"), "module": ("ds_version", "skipped_steps")}
    assert report.ignored == beside.get(wrap, ())
    assert weights.architecture.kind == {"pretrain.": "autoencoder", "finetune.": "classifier"}[kind]
    assert weights.architecture.grid_is_known == (wrap == "model")  # known from the stored arguments
    assert weights.architecture.grid == mini64.grid or wrap != "model"


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["pretrain.", "finetune."])
def test_prefixes_are_taken_off(mini64: GoldenModel, prefix: str, kind: str, tmp_path: Path) -> None:
    state = state_of(mini64, kind)
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pt")
    assert are_same(read_weights(tmp_path / "w.pt").tensors, state)


@pytest.mark.parametrize("prefix", ["encoder.", "backbone.encoder."])
def test_prefix_of_the_encoder_is_taken_off_where_there_is_no_decoder(
    mini64: GoldenModel, prefix: str, tmp_path: Path
) -> None:
    state = state_of(mini64, "finetune.")
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "w.safetensors")
    assert are_same(read_weights(tmp_path / "w.safetensors").tensors, state)
    heads_apart = {n if n.startswith(("head", "fc_norm")) else f"{prefix}{n}": t for n, t in state.items()}
    save_file(heads_apart, tmp_path / "apart.safetensors")
    assert are_same(read_weights(tmp_path / "apart.safetensors").tensors, state)


def test_names_of_a_compiled_part_are_found(mini64: GoldenModel, tmp_path: Path) -> None:
    state = state_of(mini64, "pretrain.")
    torch.save(
        {n.replace("encoder.blocks", "encoder._orig_mod.blocks"): t for n, t in state.items()}, tmp_path / "w"
    )
    assert are_same(read_weights(tmp_path / "w").tensors, state)


def test_two_names_of_one_tensor_are_refused(mini64: GoldenModel, tmp_path: Path) -> None:
    state = state_of(mini64, "pretrain.")
    torch.save({**state, "module.mask_token": state["mask_token"]}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"has both mask_token and module\.mask_token, which mean the same tensor"):
        read_weights(tmp_path / "w.pth")


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_wants_to_run_code_is_refused_and_nothing_runs(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "ran"
    content = {"model": {"mask_token": torch.zeros(1)}, "args": RunsCode(marker)}
    if zipped:
        torch.save(content, tmp_path / "w.pth")
    else:
        (tmp_path / "w.pth").write_bytes(pickle.dumps(content["args"], protocol=2))
    with pytest.raises(UserError, match=r"would run code \((posix|nt)\.mkdir\), so it was not opened"):
        read_weights(tmp_path / "w.pth")
    assert not marker.exists()
    torch.load(tmp_path / "w.pth", weights_only=False) if zipped else pickle.loads(
        (tmp_path / "w.pth").read_bytes()
    )
    assert marker.exists()  # plain loading does run the code


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "best": 0.5}, tmp_path / "empty.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"features.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10")
    (tmp_path / "nothing").mkdir()
    cases = {
        "empty.pth": "has no tensors: it has epoch, best; expected a state dict, bare or under",
        "list.pth": "has a list in it; expected a state dict",
        "vgg.pth": r"no weights in a known layout: it has features\.0\.weight",
        "text.pth": "cannot be read as weights",
        "torn.safetensors": "cannot be read",
        "nothing": r"has no weights: expected a run, a complete checkpoint, or one of model\.safetensors",
        "absent.pth": "does not exist; expected a run, a checkpoint, a .pth",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / name)


def test_truncated_file_is_refused(mini64: GoldenModel, tmp_path: Path) -> None:
    torch.save(state_of(mini64, "finetune."), tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:-4096])
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights(tmp_path / "w.pth")


def test_folder_of_deepspeed_is_read_as_data(mini64: GoldenModel, tmp_path: Path) -> None:
    """The official fine-tuning saves such a folder; its weights are the half-precision ones used in computation."""
    state = {name: tensor.half() for name, tensor in state_of(mini64, "finetune.").items()}
    torch.save({"module": state, "ds_config": {"zero_optimization": {"stage": 1}}}, tmp_path / DEEPSPEED_STATES)
    weights = read_weights(tmp_path)
    assert are_same(weights.tensors, {name: tensor.float() for name, tensor in state.items()})
    assert weights.ignored == ("ds_config",)
    assert weights.notes == (
        "to get the float32 weights out of this folder, if you trust its origin, run `python -m "
        "deepspeed.utils.zero_to_fp32` on it",
        "stored in float16, widened to float32",
    )
    (tmp_path / DEEPSPEED_STATES).rename(tmp_path / f"zero_pp_rank_0_{DEEPSPEED_STATES}")
    with pytest.raises(UserError, match=r"sharded by DeepSpeed at stage 3; first, if you trust its origin, run"):
        read_weights(tmp_path)


def test_sharded_folder_is_read_and_must_lie_in_itself(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_raw(tmp_path).tensors.keys() == {"a", "b"}
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"names two\.safetensors, which is missing"):
        read_raw(tmp_path)
    index["weight_map"]["b"] = "../two.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="expected files in its own folder"):
        read_raw(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has weights but no config\.json"):
        read_raw(tmp_path)
