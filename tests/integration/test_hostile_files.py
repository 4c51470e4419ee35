"""Weights and records with absurd claims are refused in one sentence, quickly and in little memory."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from everest_ds.cli import main
from everest_ds.cli.dispatch import LOADING
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.weights.architecture import ModelMetadata
from everest_ds.model.weights.foreign import METADATA_KEY
from everest_ds.tokens import TokenGrid
from tests.conftest import GOLDEN, make_size
from tests.integration.test_strangers import reseal

MAX_SECONDS, MAX_BYTES = 20, 2 * 2**30

Files = dict[str, Tensor]


@contextmanager
def frugal() -> Iterator[None]:
    """Require that the block is quick and its peak memory small."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started = status("VmRSS"), time.monotonic()
    yield
    assert time.monotonic() - started < MAX_SECONDS
    assert status("VmHWM") - before < MAX_BYTES


def header(**tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def named(**metadata: int) -> dict[str, str]:
    return {METADATA_KEY: ModelMetadata(**metadata).dump()}  # type: ignore[arg-type]


# Contents by extension of the file: bytes, or tensors and metadata made from the state of a complete classifier.
Spoil = Callable[[Files], bytes | Files | tuple[Files, dict[str, str]]]
ONE = torch.ones(1)
EMBEDDING = "patch_embed.proj.weight"
NOT_OURS = "was not written by `everest convert`"
HOSTILE: dict[str, tuple[str, Spoil, str]] = {
    "a block of number 10^9": (
        "safetensors",
        lambda state: state | {"blocks.1000000000.norm1.bias": ONE},
        "a block numbered 1000000000; expected at least one tensor in each block",
    ),
    "a layer of number 10^9": (
        "pth",
        lambda state: state | {"patch_embed.stem.1000000000.weight": ONE},
        "a block numbered 1000000000",
    ),
    "5000 blocks": (
        "pth",
        lambda state: state | {f"blocks.{i}.norm1.bias": ONE for i in range(5000)},
        "at most 1000 blocks",
    ),
    "1000 blocks": (
        "pth",
        lambda state: state | {f"blocks.{i}.x": ONE for i in range(999)},
        "values of its model|lacks",
    ),
    "a decoder of 10^9 blocks": (
        "pth",
        lambda state: {f"encoder.{n}": t for n, t in state.items()} | {"decoder.blocks.999999999.x": ONE},
        "a block numbered 999999999;",
    ),
    "Hugging Face's block of number 10^9": (
        "pth",
        lambda state: {"videomae.encoder.layer.1000000000.layernorm_before.bias": ONE},
        "a block numbered 1000000000",
    ),
    "a width without values": (
        "pth",
        lambda state: state | {EMBEDDING: torch.empty(10**12, 0, 2, 16, 16)},
        r"patch_embed.proj.weight has no values, its shape is \(1000000000000, 0, 2, 16, 16\)",
    ),
    "a width of one matrix": (
        "pth",
        lambda state: state | {EMBEDDING: torch.ones(3 * 10**5, 3, 1, 1, 1)},
        "values of its model|lacks|has shape|heads",
    ),
    "a million classes": (
        "pth",
        lambda state: {n: t for n, t in state.items() if n != "head.weight"} | {"head.bias": torch.ones(10**6)},
        "values of its model|lacks head.weight",
    ),
    "clips of 10^9 frames": (
        "safetensors",
        lambda state: (state, named(num_frames=10**9, image_height=64, image_width=64)),
        "tokens; expected at most 131072",
    ),
    "a billion heads": ("safetensors", lambda state: (state, named(num_heads=10**9)), "heads"),
    "a number of 5000 digits": (
        "safetensors",
        lambda state: (state, {METADATA_KEY: f'{{"num_heads": {"9" * 5000}}}'}),
        NOT_OURS,
    ),
    "metadata nested deeply": ("safetensors", lambda state: (state, {METADATA_KEY: "[" * 100_000}), NOT_OURS),
    "a header of 2^60 bytes": ("safetensors", lambda state: (2**60).to_bytes(8, "little"), "its header claims"),
    "a header of 8 MiB": ("safetensors", lambda state: header(a={"x": "y" * 2**23}), "its header claims"),
    "40 GB in a header": (
        "safetensors",
        lambda state: header(a={"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}),
        "cannot be read",
    ),
    "a name of many letters": ("safetensors", lambda state: {"a" * 100_000: ONE}, "of 100000 characters"),
    "a name that costs its square": ("pth", lambda state: {"patch_embed." * 9000: ONE}, "108000 characters"),
    "a name that writes to the terminal": (
        "pth",
        lambda state: {"\x1b]0;title\x07\x1b[2Jblocks\r\n": ONE},
        r"it has \\x1b\]0;title\\x07\\x1b\[2Jblocks\\r\\n",
    ),
    "such a name beside a model": ("pth", lambda state: state | {"\x1b[2Jodd": ONE}, r"\\x1b\[2Jodd"),
    "an integer weight": ("pth", lambda state: state | {"head.weight": torch.ones(7, 64).long()}, "is int64"),
}


def write(path: Path, made: Any) -> None:
    if isinstance(made, bytes):
        path.write_bytes(made)
    elif path.suffix == ".pth":
        torch.save({"model": made}, path)
    else:
        tensors, texts = made if isinstance(made, tuple) else (made, None)
        save_file(tensors, path, texts)


@pytest.mark.parametrize("kind", HOSTILE)
def test_weights_that_claim_the_absurd_are_refused_by_convert_and_predict(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix, spoil, message = HOSTILE[kind]
    path = tmp_path / f"w.{suffix}"
    model = EverestClassifier(make_size(64), TokenGrid(time=8, rows=14, cols=14), num_classes=7)
    write(path, spoil(model.state_dict()))
    (tmp_path / "v.mp4").touch()
    commands = [
        ["convert", str(path), str(tmp_path / "out.safetensors"), "--to", "everest"],
        ["predict", str(path), str(tmp_path / "v.mp4"), "--recipe", "demo_ft"],
    ]
    for words in commands:
        with frugal():
            assert main(words) == 2
        said = capsys.readouterr().err.removeprefix(f"{LOADING}\n")
        assert said.startswith("everest: error: ")
        assert re.search(message, said), said
        assert said.count("\n") == 1
        assert "\x1b" not in said
    assert not (tmp_path / "out.safetensors").exists()


# A file of a run, the text that is replaced in it (empty: all of it), its replacement, and the message.
DEEP, LONG = "[" * 100_000, "9" * 30
SEALED = '{"size": 1, "sha256": "0"}, "state.json"'  # of one more file
RECORDS: dict[str, tuple[str, str, str | bytes, str]] = {
    "config of huge numbers": ("config.json", '"num_frames": 4', f'"num_frames": {LONG}', "64 bits"),
    "config with NaN": ("config.json", '"seed": 0', '"seed": NaN', "NaN is not a finite number"),
    "config with an endless number": ("config.json", '"seed": 0', '"seed": 1e999', "1e999 is not a finite"),
    "config of a task in a list": (
        "config.json",
        '"task": "finetune"',
        '"task": [[0]]',
        "task=.* must be",
    ),
    "config nested deeply": ("config.json", "", DEEP, "nested too deeply"),
    "config that is no text": ("config.json", "", b"\xff\xfe\0", "config.json is not JSON"),
    "config with a control character": ("config.json", '"seed"', r'"\u001b[2Jseed"', r"key run.\\x1b\[2Jseed"),
    "state with a text for a step": ("state.json", '"step": 3', '"step": "3"', "step='3'"),
    "state of a step of 30 digits": ("state.json", '"step": 3', f'"step": {LONG}', "64 bits"),
    "state of negative steps": ("state.json", '"step": 3', '"step": -3', "step=-3"),
    "state with NaN": ("state.json", '"step": 3', '"step": NaN', "NaN is not"),
    "state of many processes": ("state.json", '"world_size": 1', f'"world_size": {10**18}', "world_size=10000"),
    "state of stage 7": ("state.json", '"zero_stage": 0', '"zero_stage": 7', "ZeRO stage 7"),
    "state nested deeply": ("state.json", "", DEEP, "nested too deeply"),
    "seal nested deeply": ("complete.json", "", f'{{"files": {DEEP}', "nested too deeply"),
    "seal of a list": ("complete.json", "", '{"files": [1]}', "complete.json does not name state.json"),
    "seal without sizes": ("complete.json", '"size"', '"siz"', "without a size"),
    "seal of files elsewhere": (
        "complete.json",
        '"state.json"',
        f'"../../../s": {SEALED}',
        "outside of the folder",
    ),
    "seal of a device": (
        "complete.json",
        '"state.json"',
        f'"/dev/zero": {SEALED}',
        "names /dev/zero, outside of the",
    ),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_records_that_claim_the_absurd_are_refused_by_convert(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, old, new, message = RECORDS[kind]
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "run_of_0_1", run)
    path = next(run.rglob(name))
    content = path.read_text().replace(old, str(new), 1) if old else new
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    if name == "state.json":
        reseal(path.parent)
    with frugal():
        assert main(["convert", str(run), str(tmp_path / "out.safetensors"), "--to", "everest"]) == 2
    said = capsys.readouterr().err.removeprefix(f"{LOADING}\n")
    assert re.search(message, said), said
    assert said.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()
