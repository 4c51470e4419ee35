"""Every command that reads weights refuses unusable tensors and names them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from everest_ds.cli import main
from everest_ds.errors import UserError
from everest_ds.model.weights.reading import read_weights, require_finite, widen
from tests.conftest import GoldenModel

NAME = "blocks.1.attn.qkv.weight"


def spoiled(tensor: Tensor, kind: str) -> Tensor:
    """Return a tensor with one kind of damage."""
    if kind in ("nan", "inf", "-inf"):
        tensor = tensor.clone()
        tensor[0, :2] = float(kind)
        return tensor
    return {
        "half_inf": lambda: torch.where(torch.arange(tensor.shape[1]) == 3, 7e4, tensor).half(),
        "float64_too_large": lambda: tensor.double().index_fill(0, torch.tensor([1]), 1e300),
        "complex": lambda: torch.complex(tensor, tensor),
        "complex_without_imaginary_part": lambda: torch.complex(tensor, torch.zeros_like(tensor)),
        "sparse": lambda: tensor.to_sparse(),
        "float8": lambda: tensor.to(torch.float8_e4m3fn),
        "int8": lambda: (100 * tensor).to(torch.int8),
        "bool": lambda: tensor > 0,
    }[kind]()


FAULTS = {
    "nan": r"has 2 NaN and 0 infinite of \d+ values",
    "inf": r"has 0 NaN and 2 infinite of \d+ values",
    "-inf": r"has 0 NaN and 2 infinite of \d+ values",
    "half_inf": r"has 0 NaN and \d+ infinite",
    "float64_too_large": r"has 0 NaN and \d+ infinite",
    "complex": r"is complex \(complex64\)",
    "complex_without_imaginary_part": r"is complex \(complex64\)",
    "sparse": r"is sparse \(torch.sparse_coo\)",
    "float8": r"is float8_e4m3fn",
    "int8": r"is int8; expected dense weights in float64, float32, float16, bfloat16",
    "bool": r"is bool",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_reading_refuses_weights_that_are_not_finite_real_numbers(
    mini64: GoldenModel, kind: str, tmp_path: Path
) -> None:
    state = mini64.classifier(1.0).state_dict()
    torch.save({"model": {**state, NAME: spoiled(state[NAME], kind)}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"w.pth: {NAME} {FAULTS[kind]}"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_reading_takes_other_floating_types(mini64: GoldenModel, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in mini64.classifier(1.0).state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    read = read_weights(tmp_path / "w.pth").tensors
    assert all(torch.equal(read[name], tensor.float()) for name, tensor in state.items())


def test_counters_and_index_tables_that_are_no_weights_are_let_through() -> None:
    given = {"num_batches_tracked": torch.tensor(3), "relative_position_index": torch.zeros(2, dtype=torch.int64)}
    assert {name: t.dtype for name, t in widen(given, "x").items()} == dict.fromkeys(given, torch.float32)


def test_message_counts_the_other_tensors_and_names_the_first() -> None:
    given = {"a": torch.ones(2), "b": torch.tensor([math.nan, 1, math.inf]), "c": torch.tensor([math.inf])}
    with pytest.raises(UserError) as refused:
        require_finite(given, "w.pth")
    assert "w.pth: b has 1 NaN and 1 infinite of 3 values, and 1 more tensors have" in str(refused.value)
    assert "Use a checkpoint from before the loss diverged" in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "W", "OUT", "--to", "hf"],
        ["convert", "W", "OUT.safetensors", "--to", "everest"],
        ["convert", "W", "OUT.pth", "--to", "videomae"],
        ["predict", "W", "VIDEO", "--recipe", "demo_ft"],
        ["predict", "W", "VIDEO", "--recipe", "demo_ft", "--features", "OUT.safetensors"],
        ["evaluate", "W", "--recipe", "demo_ft", "--list", "LIST", "--out", "OUT"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_command_refuses_weights_with_nan_and_writes_nothing(
    words: list[str], name: str, mini64: GoldenModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = mini64.classifier(1.0).state_dict()
    state[NAME] = spoiled(state[NAME], "nan")
    torch.save(state, tmp_path / name) if name.endswith("pth") else save_file(state, tmp_path / name)
    (tmp_path / "v.mp4").touch()
    (tmp_path / "list.csv").write_text("v.mp4 0\n")
    places = {"W": tmp_path / name, "VIDEO": tmp_path / "v.mp4", "LIST": tmp_path / "list.csv"}
    places |= {word: tmp_path / word for word in words if word.startswith("OUT")}
    before = {path.name for path in tmp_path.iterdir()}
    assert main([str(places.get(word, word)) for word in words]) == 2
    assert f"{NAME} has 2 NaN" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == before
