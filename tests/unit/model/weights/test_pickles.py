"""Files of torch.save are examined before loading: the names in their pickles, and whether tensors are missing."""

from __future__ import annotations

import _codecs
import argparse
import io
import pickle
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everest_ds.errors import UserError
from everest_ds.model.weights.pickles import MAX_PICKLE_BYTES, StoredTensor, look, read_pickle

REFUSED = r"w\.pth (is a pickle that would run code|cannot be read as weights)"
ARGUMENTS = {"argparse.Namespace": argparse.Namespace}


def zipped(path: Path, code: bytes, values: bytes = b"\0" * 8, kind: int = zipfile.ZIP_STORED) -> Path:
    """Write a file in torch.save's layout from a given pickle and the values of storage 0."""
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in (
            ("data.pkl", code),
            ("byteorder", b"little"),
            ("data/0", values),
            ("version", b"3\n"),
        ):
            archive.writestr(f"w/{name}", content)
    return path


class Call:
    """Pickled as a function call. Persistent ids among the arguments stand for storages."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class _Pickler(pickle._Pickler):
    def persistent_id(self, item: Any) -> Any:
        return item.identity if isinstance(item, Stored) else None


class Stored:
    def __init__(self, numel: int, kind: Any = torch.FloatStorage, key: str = "0") -> None:
        self.identity = ("storage", kind, key, "cpu", numel)


def pickled(content: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, 2).dump(content)
    return file.getvalue()


def tensor(numel: int, *size: int, stride: tuple[int, ...] | None = None, offset: int = 0) -> Call:
    strides = stride if stride is not None else tuple(1 for _ in size)
    return Call(torch._utils._rebuild_tensor_v2, Stored(numel), offset, size, strides, False, OrderedDict())


def test_everything_that_torch_saves_of_weights_passes_and_is_read(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    content = {
        "model": OrderedDict(a=whole[:3], b=whole[3:], tied=whole, scalar=torch.tensor(2.0), none=torch.zeros(0)),
        "parameter": nn.Parameter(torch.ones(2, 3).bfloat16()),
        "turned": torch.ones(2, 3).T,
        "args": argparse.Namespace(lr=1e-3, betas=(0.9, 0.99)),
        "others": [1, 2.5, None, True, "x", b"bytes", {3}, Counter("aab"), torch.Size([2]), torch.float16, 2 + 1j],
        "state": {0: {"step": 3, "exp_avg": torch.zeros(2, dtype=torch.float64)}},
    }  # fmt: skip
    for path, is_zip in ((tmp_path / "new.pth", True), (tmp_path / "old.pth", False)):
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
        seen = look(path, ARGUMENTS)
        assert seen["turned"] == StoredTensor(shape=(3, 2), num_bytes=24)
        assert seen["parameter"] == StoredTensor(shape=(2, 3), num_bytes=12)
        found = read_pickle(path, objects=ARGUMENTS)
        assert torch.equal(found["model"]["b"], whole[3:])
        assert found["args"] == content["args"]
        assert found["others"] == content["others"]


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch.Tensor.apply_", "a\x1b[2J.b"])
@pytest.mark.parametrize("as_zip", [True, False])
def test_name_of_anything_else_is_refused_before_it_is_looked_up(name: str, as_zip: bool, tmp_path: Path) -> None:
    module, function = name.split(".", 1)
    code = b"\x80\x02}X\x01\0\0\0m" + f"c{module}\n{function}\n".encode() + b"U\x02ls\x85Rs."
    path = tmp_path / "w.pth"
    zipped(path, code) if as_zip else path.write_bytes(code)
    with pytest.raises(UserError, match=r"w.pth is a pickle that would run code"):
        look(path)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.marker,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("nest", [lambda p: p, lambda p: {"a": [(p,)]}, lambda p: argparse.Namespace(x=p)])
def test_payload_is_refused_in_every_protocol_and_nesting(
    protocol: int, nest: Callable[[Any], Any], tmp_path: Path
) -> None:
    marker, path = tmp_path / "ran", tmp_path / "w.pth"
    bare = pickle.dumps(nest(Payload(marker)), protocol)
    old = tmp_path / "old.pth"
    torch.save(nest(Payload(marker)), old, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    for content in (bare, old.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=REFUSED):
            read_pickle(path, objects=ARGUMENTS)
    with pytest.raises(UserError, match=REFUSED):
        read_pickle(zipped(path, bare), objects=ARGUMENTS)
    assert not marker.exists()
    pickle.loads(bare)
    assert marker.exists()  # plain loading does run the code


HUGE = 10**10
LIES: dict[str, tuple[Any, str]] = {
    "storage larger than the file": (tensor(HUGE, HUGE), "asks for 40000000000 bytes of values but has 8"),
    "storage of negative size": (tensor(-1, 1), "cannot be read as weights"),
    "storage that is not there": (
        Call(torch._utils._rebuild_tensor_v2, Stored(2, key="7"), 0, (2,), (1,), False, OrderedDict()),
        "of values but has 0",
    ),
    "tensor larger than its storage": (
        tensor(2, HUGE),
        "a asks for 40000000000 bytes of values but",
    ),
    "tensor behind its storage": (tensor(2, 1, offset=HUGE), "a asks for 4 bytes of values but has 8"),
    "one value repeated": (tensor(2, HUGE, stride=(0,)), "a asks for 40000000000 bytes of values"),
    "many axes": (tensor(2, *[1] * 70), "a tensor of 70 axes"),
    "bytes that are not there": (Call(bytearray, HUGE), "cannot be read as weights"),
    "tensor by its size": (Call(torch.Tensor, HUGE), "cannot be read as weights"),
    "storage by its size": (Call(torch.UntypedStorage, HUGE), "cannot be read as weights"),
    "text in a slow encoding": (Call(_codecs.encode, "x" * 9999, "punycode"), "punyc"),
    "name of many letters": ({"a" * 100_000: 1}, "a tensor name of 100000 characters"),
    "number that collides": ({2**61 - 1: 1}, "cannot be read as weights"),
    "pair as a name": ({(1, 2): 1}, "a tuple as a name"),
    "too many names": ({str(i): i for i in range(400_000)}, "more than 2 MiB"),
    "tensors that share values": (
        {str(i): tensor(2**18, 2**18) for i in range(40)},
        "its tensors ask for more than 4 times as many",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_asks_for_too_much_is_refused_at_once(lie: str, tmp_path: Path) -> None:
    content, message = LIES[lie]
    values = b"\0" * (2**20 if "share" in lie else 8)
    path = zipped(tmp_path / "w.pth", pickled({"a": content}), values)
    started = time.process_time()
    with pytest.raises(UserError, match=message) as refused:
        look(path)
    assert time.process_time() - started < 5
    assert str(refused.value).startswith(str(path))


def test_compressed_parts_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "w.pth", pickled({}), b"\0" * 10**8, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**6
    with pytest.raises(UserError, match=r"has a compressed part \(w/data\.pkl\); torch\.save never writes one"):
        look(path)


def test_deep_nesting_and_odd_opcodes_are_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    assert isinstance(look(zipped(tmp_path / "w.pth", deep)), list)
    torch.save({"a": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "w.pth")
    assert look(tmp_path / "w.pth")["a"].num_bytes == 3
    for code in (
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02R.",
        b"\x80\x02}(.",
        b"h\x05.",
        b"\x80\x02K\x01K\x02\x86Q.",
        b"\xff",
    ):
        with pytest.raises(UserError, match="cannot be read as weights"):
            look(zipped(tmp_path / "w.pth", code))
    (tmp_path / "old.pth").write_bytes(b"\x80\x02" + b"N" * MAX_PICKLE_BYTES)
    with pytest.raises(UserError, match="cannot be read as weights"):
        look(tmp_path / "old.pth")


ODD = {
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "sparse (torch.sparse_csr)": lambda t: t.to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t, t[:1]]),
    "it is on the meta device": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_no_weights_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    torch.save({"model": {"head.weight": ODD[kind](torch.ones(2, 2))}}, tmp_path / "w.pth")
    with pytest.raises(UserError) as refused:
        look(tmp_path / "w.pth")
    assert f"w.pth: head.weight {'' if 'meta' in kind else 'is '}" in str(refused.value)
    assert kind in str(refused.value)
    torch.save([ODD[kind](torch.ones(2, 2))], tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth has a tensor that"):
        look(tmp_path / "w.pth")
