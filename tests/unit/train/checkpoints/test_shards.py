"""Shards are read as data, by this project and by DeepSpeed's loaders; shards with code are refused."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.model.weights.pickles import read_pickle
from everest_ds.train.checkpoints.save import pickle_stages_by_value
from everest_ds.train.checkpoints.shards import WEIGHTS_ONLY, as_data, find_code, read_shard

ALONE = World(rank=0, local_rank=0, size=1, local_size=1)
GENUINE = {
    "loss_scaler": LossScaler(scale=1.0),
    "zero_stage": ZeroStageEnum.weights,
    "param_slice_mappings": [{"model.mask_token": fragment_address(numel=3, start=1)}],
    "ds_config": {"optimizer": None, "bf16": {"enabled": True}},
    "fp32_groups": [[torch.ones(2)]],
}


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_genuine_objects_are_read_by_us_and_by_deepspeed(tmp_path: Path) -> None:
    torch.save(GENUINE, tmp_path / "s.pt")
    assert find_code(tmp_path, ALONE) is None
    ours = read_shard(tmp_path / "s.pt", has_objects=True)
    with as_data():
        theirs = torch.load(tmp_path / "s.pt", weights_only=False)
    for found in (ours, theirs):
        assert found["zero_stage"] is ZeroStageEnum.weights
        assert found["param_slice_mappings"] == GENUINE["param_slice_mappings"]
        assert found["loss_scaler"].cur_scale == 1.0
        assert torch.equal(found["fp32_groups"][0][0], torch.ones(2))
    with pytest.raises(UserError, match=r"would run code .*LossScaler"):
        read_shard(tmp_path / "s.pt")  # model states may not contain classes


@pytest.mark.parametrize("before", [None, "0"])
def test_deepspeed_runs_nothing_even_of_a_file_that_nobody_looked_at(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WEIGHTS_ONLY, before) if before else monkeypatch.delenv(WEIGHTS_ONLY, raising=False)
    torch.save({"more": [Payload(tmp_path / "ran")]}, tmp_path / "s.pt")
    with pytest.raises(pickle.UnpicklingError), as_data():
        torch.load(tmp_path / "s.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
    assert os.environ.get(WEIGHTS_ONLY) == before
    assert LossScaler not in torch.serialization.get_safe_globals()
    torch.load(tmp_path / "s.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # plain loading does run the code


def payload(folder: Path) -> Any:
    return Payload(folder / "ran")


# Content of a shard, and a part of the message.
SPOILED = {
    "code in a list": (lambda folder: {"module": {}, "x": [[payload(folder)]]}, r"run code .*\(posix\.mkdir\)"),
    "another class of DeepSpeed's": (lambda folder: {"x": DynamicLossScaler(1, 2, 2, 1, 1, True)}, "DynamicLossS"),
    "a class that weights may name": (lambda folder: {"args": argparse.Namespace(a=1)}, r"argparse\.Namespace"),
    "a module": (lambda folder: {"module": torch.nn.Linear(2, 2)}, r"torch\.nn\.modules\.linear\.Linear"),
    "a numpy array": (lambda folder: {"x": torch.ones(2).numpy()}, r"numpy"),
    "a name that leads out": (lambda folder: {"param_shapes": [{"../../x": torch.Size([1])}]}, "entry '../../x'"),
    "a name of the folder above": (lambda folder: {"module": {"..": torch.ones(1)}}, r"entry '\.\.'"),
    "an absolute name": (lambda folder: {"x": {"/tmp/x": 1}}, "entry '/tmp/x'"),
    "a pattern as a name": (lambda folder: {"x": {"*": 1}}, r"entry '\*'"),
    "a name that writes to the terminal": (lambda folder: {"a\x1b[2J": 1}, r"entry 'a\\\\x1b\[2J'"),
    "patterns for the converter": (
        lambda folder: {"universal_checkpoint_info": {"vocabulary_parameter_patterns": ["(a+)+$"]}},
        "entry 'universal_checkpoint_info'",
    ),
    "experts": (lambda folder: {"ds_autoep_layers": [{"expert_key_prefix": "../x"}]}, "entry 'ds_autoep_layers'"),
    "a sparse tensor": (lambda folder: {"module": {"w": torch.eye(2).to_sparse()}}, r"s\.pt: w is sparse"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("zipped", [True, False])
def test_shard_that_is_not_data_alone_is_named(kind: str, zipped: bool, tmp_path: Path) -> None:
    make, message = SPOILED[kind]
    folder = tmp_path / "step" / "zero" / "model.mask_token"
    folder.mkdir(parents=True)
    torch.save(GENUINE, folder / "a.pt")
    torch.save(make(tmp_path), folder / "s.pt", _use_new_zipfile_serialization=zipped)
    fault = find_code(tmp_path / "step", ALONE)
    assert fault is not None
    assert str(folder / "s.pt") in fault
    assert re.search(message, fault), fault
    found = [find_code(tmp_path / "step", World(rank=rank, local_rank=0, size=2, local_size=1)) for rank in (0, 1)]
    assert found == [None, fault]  # the ranks divide the files between them
    assert not (tmp_path / "ran").exists()


def test_script_of_torch_and_what_is_no_file_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "s.pt")
    assert "s.pt has a compressed part" in str(find_code(tmp_path, ALONE))
    (tmp_path / "s.pt").unlink()
    os.mkfifo(tmp_path / "s.pt")
    assert "it is not a regular file" in str(find_code(tmp_path, ALONE))
    (tmp_path / "s.pt").unlink()
    (tmp_path / "zero").symlink_to("/tmp", target_is_directory=True)
    assert "zero is a link to a folder, so it was not read" in str(find_code(tmp_path, ALONE))


class ByName:
    """Pickled like a member of an enumeration in Python 3.11.0 to 3.11.3."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, tuple[type, str]]:
        return getattr, (self.owner, self.name)


def test_stage_that_is_pickled_by_name_is_read_and_nothing_else_of_a_class(tmp_path: Path) -> None:
    path = tmp_path / "shard.pt"
    torch.save({"zero_stage": ByName(ZeroStageEnum, "gradients")}, path)
    assert find_code(tmp_path, ALONE) is None
    assert read_shard(path, has_objects=True)["zero_stage"] is ZeroStageEnum.gradients
    for owner, name in ((ZeroStageEnum, "mro"), (LossScaler, "__init__"), (dict, "pop")):
        torch.save({"zero_stage": ByName(owner, name)}, path)
        with pytest.raises(UserError):
            read_shard(path, has_objects=True)
    with pytest.raises(UserError, match=r"would run code \(builtins.getattr\)"):
        read_pickle(path)  # weights contain no enumerations


def test_stages_are_pickled_by_value_on_every_python() -> None:
    pickle_stages_by_value()
    pickled = pickle.dumps(ZeroStageEnum.gradients)
    assert b"getattr" not in pickled
    assert pickle.loads(pickled) is ZeroStageEnum.gradients
