"""Checks files of torch.save before they are read: what they name, and whether tensors have all their values.

Place in the flow: PATH -> `look` -> `read_pickle` -> the result of torch.load(weights_only=True). `look` walks
through the opcodes of a pickle and creates only containers and shapes. So a bad file is refused before any of its
objects is created and before memory is allocated, for example a file of 2 KB that asks for 40 GB.
"""

import enum
import io
import os
import pickle
import pickletools
import stat
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from everest_ds.errors import UserError, escaped

# A pickle has names and shapes: 45 KB for 88 weights with their float32 copies and moments. It is walked through
# twice, at about 1 MB/s.
MAX_PICKLE_BYTES = 2 * 2**20
MAX_DIRECTORY_BYTES = 16 * 2**20  # of a zip file
MAX_NAME_LENGTH = 500
# Tensors of a file may share values, as tied weights do. In all they may ask for this many times the file's size.
MAX_SHARED = 4
SMALL_BYTES = 2**20
MAX_AXES = 64  # as in torch
NUM_LEGACY_PICKLES = 5  # of a file of torch 1.5 and before: magic number, version, system, content, keys

ITEM_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
    "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "Untyped": 1, "QInt8": 1, "QUInt8": 1, "QInt32": 4,
    "QUInt4x2": 1, "QUInt2x4": 1,
}  # fmt: skip
# Tensors that cannot be used as weights, by the function of torch._utils that creates them.
ODD_TENSORS = {
    "_rebuild_qtensor": "is quantised",
    "_rebuild_meta_tensor_no_storage": "has no values (it is on the meta device)",
    "_rebuild_nested_tensor": "is nested",
    "_rebuild_wrapper_subclass": "is of a tensor subclass",
    "_rebuild_device_tensor_from_numpy": "is on another device",
    "_rebuild_device_tensor_from_cpu_tensor": "is on another device",
}
# Python 3.11.0 to 3.11.3 pickle a member of an enumeration by this call; others call its class with its value.
MEMBER_BY_NAME = "builtins.getattr"
EXPECTED = "expected dense weights in float64, float32, float16, bfloat16"
ADVICE = (
    "If you trust its origin, load it there and save only its state dict, by torch.save({'model': state_dict}, ...)"
)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file, without its values."""

    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, eq=False)
class _Named:
    """A class or function that a pickle names. It is not imported; ``make`` replaces a call of it."""

    name: str
    make: Callable[..., Any] | None = None
    item_bytes: int = 0


@dataclass(frozen=True)
class _Storage:
    num_bytes: int
    item_bytes: int


@dataclass(frozen=True)
class _Odd:
    """A tensor that is refused as soon as its name is known."""

    fault: str


class _Object:
    """Replaces an object of an allowed class; ignores its constructor and state."""


class _OrderedDict(dict[Any, Any]):
    """A dict that a pickle may give a state."""


class _FormatError(ValueError):
    """The file is not a pickle of the kind that torch.save writes."""


def read_pickle(
    path: Path, *, objects: Mapping[str, type] | None = None, mmap: bool = False, advice: str = ADVICE
) -> Any:
    """Unpickle tensors, plain containers, and objects of a few harmless classes; nothing else.

    Args:
        path: A file of torch.save.
        objects: The harmless classes by their full names; see `look`.
        mmap: Read tensors only when they are used.
        advice: The end of the message for a refused file: what to do if one trusts it.

    Raises:
        UserError: See `look`.
    """
    objects = objects or {}
    look(path, objects, advice)
    try:
        with torch.serialization.safe_globals(safe_globals(objects)):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except (
        OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError, MemoryError,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise UserError(f"{path} cannot be read as weights: {_first_line(error)}") from error


def safe_globals(objects: Mapping[str, type]) -> list[Any]:
    """Return what torch's weights_only must accept besides its defaults, for files that `look` accepted."""
    return [*objects.values(), (enum_member, MEMBER_BY_NAME)] if objects else []


def enum_member(owner: type, name: str) -> Any:
    """Return a member of an enumeration by its name; replaces the getattr that Python 3.11.0 to 3.11.3 pickles.

    Raises:
        UnpicklingError: There is no such member, or ``owner`` is not an enumeration.
    """
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__):
        raise pickle.UnpicklingError(f"{name!r:.40} is not a member of an enumeration")
    return owner[name]


def look(path: Path, objects: Collection[str] = (), advice: str = ADVICE) -> Any:
    """Walk through a file of torch.save without reading its tensors.

    Args:
        path: The file, zipped or in the format of torch 1.5 and before.
        objects: Full names of classes that it may name; their objects are not created here.
        advice: The end of the message for files that name anything else.

    Returns:
        Its content: containers and numbers as they are, each tensor as a `StoredTensor`.

    Raises:
        UserError: It names another class or function, is not a file of torch.save, or has a tensor that is sparse,
            quantised, nested, or whose values are not all in the file.
    """
    try:
        with _open(path) as file:
            return _Look(path, file, objects, advice).content
    except UserError:
        raise
    except (
        OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError, MemoryError,
        RecursionError, OverflowError, NotImplementedError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        known = isinstance(error, _FormatError | OSError | zipfile.BadZipFile)
        why = _first_line(error) if known else "it is damaged, or not a file of torch.save"
        raise UserError(f"{path} cannot be read as weights: {why}") from error


def _first_line(error: BaseException) -> str:
    return escaped(str(error).strip().split("\n")[0]) or type(error).__name__


class _Bounded(io.FileIO):
    """A file that refuses to be read in large pieces."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise _FormatError(f"its directory has more than {MAX_DIRECTORY_BYTES // 2**20} MiB")
        return super().read(size if size is not None and size >= 0 else MAX_DIRECTORY_BYTES) or b""


def _open(path: Path) -> "_Bounded":
    file = _Bounded(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # so that opening a named pipe does not block
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _FormatError("it is not a regular file")
    return file


class _Look:
    """A walk through the pickles of one file."""

    def __init__(self, path: Path, file: _Bounded, objects: Collection[str], advice: str) -> None:
        self._path, self._objects, self._advice = path, objects, advice
        self._size = os.fstat(file.fileno()).st_size
        self._asked = 0
        self._odd: list[_Odd] = []
        self._members: dict[str, int] | None = None
        self._legacy: dict[str, int] = {}
        if file.read(4) == b"PK\x03\x04":
            self.content = self._walk(io.BytesIO(self._unzip(file)))
        else:
            file.seek(0)
            pickles = io.BytesIO(file.read(MAX_PICKLE_BYTES))
            found = [self._walk(pickles) for _ in range(NUM_LEGACY_PICKLES)]
            if sum(self._legacy.values()) > self._size:
                self._refuse(f"asks for {sum(self._legacy.values())} bytes of values but has only {self._size}")
            self.content = found[3]
        if self._odd:
            self._refuse(f"has a tensor that {self._odd[0].fault}; {EXPECTED}")

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self._path} {what}")

    def _unzip(self, file: _Bounded) -> bytes:
        """Return the pickle of a zipped file, and note the sizes of its storages."""
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                    self._refuse(f"has a compressed part ({escaped(member.filename)}); torch.save never writes one")
            sizes = {member.filename: member.file_size for member in members}
            if len(sizes) != len(members) or sum(sizes.values()) > self._size:
                raise _FormatError("its parts overlap")
            top = members[0].filename.partition("/")[0] if members else ""
            if not all(name.startswith(f"{top}/") for name in sizes):
                raise _FormatError("its parts are in more than one folder")
            if sizes.get(f"{top}/data.pkl", MAX_PICKLE_BYTES) >= MAX_PICKLE_BYTES:
                raise _FormatError(f"its data.pkl is missing or has more than {MAX_PICKLE_BYTES // 2**20} MiB")
            self._members = {name.removeprefix(f"{top}/data/"): size for name, size in sizes.items()}
            return archive.read(f"{top}/data.pkl")

    def _walk(self, file: BinaryIO) -> Any:
        """Walk through one pickle; return its content."""
        stack: list[Any] = []
        marked: list[list[Any]] = []
        memo: dict[int, Any] = {}
        for opcode, value, _ in pickletools.genops(file):
            name = opcode.name
            if name in PUSHED:
                stack.append(value)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name in EMPTY:
                stack.append(EMPTY[name]())
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[value if isinstance(value, int) else len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[_require(value, int)])
            elif name == "MARK":
                marked.append(stack)
                stack = []
            elif name in ("TUPLE", "APPENDS", "SETITEMS"):
                stack, items = marked.pop(), stack
                if name == "TUPLE":
                    stack.append(tuple(items))
                elif name == "APPENDS":
                    _require(stack[-1], list).extend(items)
                else:
                    self._set(stack[-1], items)
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                self._act(name, value, stack)
        raise EOFError

    def _act(self, name: str, value: Any, stack: list[Any]) -> None:
        """Apply an opcode that takes the last values off the stack."""
        if name in ("GLOBAL", "INST"):
            stack.append(self._find(*value.split(" ", 1)))
            return
        last = stack.pop()
        if name == "STACK_GLOBAL":
            stack.append(self._find(_require(stack.pop(), str), _require(last, str)))
        elif name == "TUPLE1":
            stack.append((last,))
        elif name == "TUPLE2":
            stack.append((stack.pop(), last))
        elif name == "TUPLE3":
            middle = stack.pop()
            stack.append((stack.pop(), middle, last))
        elif name == "APPEND":
            _require(stack[-1], list).append(last)
        elif name == "SETITEM":
            key = stack.pop()
            self._set(stack[-1], [key, last])
        elif name == "BINPERSID":
            stack.append(self._store(last))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(self._make(stack.pop(), _require(last, tuple)))
        elif name == "BUILD":
            if not isinstance(stack[-1], _Object | _OrderedDict) or not isinstance(last, dict | tuple):
                raise _FormatError(f"it gives a {type(stack[-1]).__name__} a state")
        else:
            raise _FormatError(f"it has the opcode {name}, which torch.save never writes")

    def _set(self, target: Any, items: list[Any]) -> None:
        """Fill a dictionary with alternating keys and values; refuse an odd tensor by its name."""
        content = _require(target, dict)
        for key, item in zip(items[::2], items[1::2], strict=True):
            _require_key(key)
            if isinstance(item, _Odd):
                raise UserError(f"{self._path}: {escaped(str(key))} {item.fault}; {EXPECTED}")
            content[key] = item

    def _find(self, module: str, name: str) -> _Named:
        """Return the replacement of a class or function; refuse one that is not on the list."""
        module = {"__builtin__": "builtins"}.get(module, module)
        full, found = f"{module}.{name}", None
        if full in self._objects:
            found = _Named(full, lambda *_: _Object())
        elif full == MEMBER_BY_NAME and self._objects:
            found = _Named(full, self._member)
        elif full in CONTAINERS:
            found = _Named(full, CONTAINERS[full])
        elif module in ("torch", "torch.cuda", "torch.storage") and name.removesuffix("Storage") in ITEM_BYTES:
            found = _Named(full, item_bytes=ITEM_BYTES[name.removesuffix("Storage")])
        elif module == "torch" and isinstance(attribute := vars(torch).get(name), torch.dtype):
            found = _Named(full, item_bytes=attribute.itemsize)
        elif full == "torch.Tensor" or (module == "torch" and isinstance(attribute, torch.qscheme)):
            found = _Named(full)
        elif module in ("torch._utils", "torch._tensor", "torch.nn.parameter", "torch.serialization"):
            found = self._tensor_maker(full, name)
        if found is None:
            raise UserError(
                f"{self._path} is a pickle that would run code ({escaped(full)}), so it was not opened. "
                f"{self._advice}"
            )
        return found

    def _tensor_maker(self, full: str, name: str) -> _Named | None:
        if name in ODD_TENSORS:
            return _Named(full, lambda *_: self._note(ODD_TENSORS[name]))
        makers: dict[str, Callable[..., Any]] = {
            "_rebuild_tensor": self._tensor,
            "_rebuild_tensor_v2": self._tensor,
            "_rebuild_tensor_v3": self._tensor_of_dtype,
            "_rebuild_parameter": lambda tensor, *_: tensor,
            "_rebuild_parameter_with_state": lambda tensor, *_: tensor,
            "Parameter": lambda tensor, *_: tensor,
            "_rebuild_from_type_v2": lambda function, kind, arguments, state: self._make(function, arguments),
            "_rebuild_sparse_tensor": lambda layout, *_: self._note(f"is sparse ({_require(layout, str)})"),
            "_get_layout": lambda layout: escaped(_require(layout, str)[:MAX_NAME_LENGTH]),
        }
        return _Named(full, makers[name]) if name in makers else None

    def _member(self, owner: Any, name: Any) -> _Object:
        """Return the replacement of a member of an enumeration on the list."""
        if _require(owner, _Named).name not in self._objects or not _require(name, str).isidentifier():
            raise _FormatError(f"it takes an attribute of {owner.name}")
        return _Object()

    def _note(self, fault: str) -> _Odd:
        self._odd.append(_Odd(fault))
        return self._odd[-1]

    def _make(self, named: Any, arguments: tuple[Any, ...]) -> Any:
        make = _require(named, _Named).make
        if make is None:
            raise _FormatError(f"it creates a {named.name}")
        return make(*arguments)

    def _store(self, identity: Any) -> _Storage:
        """Return a storage; refuse one whose size differs from that of its part of the file."""
        kind, storage, key, _, numel, *view = _require(identity, tuple)
        item_bytes = _require(storage, _Named).item_bytes
        if kind != "storage" or not item_bytes or type(numel) is not int or numel < 0:
            raise _FormatError("it has a malformed storage")
        needed = numel * item_bytes
        if self._members is None:
            self._legacy[_require(key, str)] = needed
            if view and view[0] is not None:
                _, start, length = _require(view[0], tuple)
                if min(start, length) < 0 or start + length > numel:
                    raise _FormatError("it has a view beyond the end of its storage")
                return _Storage(length * item_bytes, item_bytes)
        elif self._members.get(_require(key, str)) != needed or view:
            there = self._members.get(key, 0)
            self._refuse(f"asks for {needed} bytes of values but has {there} (data/{escaped(key)})")
        return _Storage(needed, item_bytes)

    def _tensor_of_dtype(self, *arguments: Any) -> "StoredTensor | _Odd":
        *first, dtype = arguments[:7]
        storage = _require(first[0], _Storage)
        return self._tensor(_Storage(storage.num_bytes, _require(dtype, _Named).item_bytes), *first[1:])

    def _tensor(self, storage: Any, *others: Any) -> "StoredTensor | _Odd":
        """Return a tensor; refuse one whose values are not all in its storage."""
        offset, size, stride, _, hooks, meta = (*others, None, None, None)[:6]
        storage, size, stride = _require(storage, _Storage), _require(size, tuple), _require(stride, tuple)
        numbers = (offset, *size[:MAX_AXES], *stride[:MAX_AXES])
        if hooks or len(size) != len(stride) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise _FormatError("it has a tensor with a malformed shape")
        if len(size) > MAX_AXES:
            raise _FormatError(f"it has a tensor of {len(size)} axes")
        numel = 1
        for edge in size:
            numel *= edge
        num_bytes = numel * storage.item_bytes
        last = offset + sum((edge - 1) * step for edge, step in zip(size, stride, strict=True))
        if num_bytes and ((last + 1) * storage.item_bytes > storage.num_bytes or num_bytes > storage.num_bytes):
            return self._note(f"asks for {num_bytes} bytes of values but has {storage.num_bytes}")
        if meta:
            return self._note("is a view of conjugated or negated values")
        self._asked += num_bytes
        if self._asked > MAX_SHARED * self._size + SMALL_BYTES:
            self._refuse(f"has {self._size} bytes, but its tensors ask for more than {MAX_SHARED} times as many")
        return StoredTensor(shape=size, num_bytes=num_bytes)


def _require(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        raise _FormatError(f"a {type(value).__name__.strip('_')} is in the wrong place")
    return value


def _require_key(key: Any) -> None:
    """Refuse dictionary keys that can be made to collide, and absurdly long names."""
    if isinstance(key, str) and len(key) > MAX_NAME_LENGTH:
        raise _FormatError(f"it has a tensor name of {len(key)} characters, {escaped(key[:40])}...")
    if key is not None and (type(key) not in (str, int, bool) or (type(key) is int and abs(key) >= 2**60)):
        raise _FormatError(f"it has a {type(key).__name__} as a name")


def _ordered(items: Any = ()) -> _OrderedDict:
    pairs = list(items.items() if isinstance(items, dict) else items)
    for key, _ in pairs:
        _require_key(key)
    return _OrderedDict(pairs)


def _encoded(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8"):  # others may take much time or memory
        raise _FormatError(f"it encodes text as {escaped(_require(encoding, str)[:40])}")
    return _require(text, str).encode(encoding)


def _set_of(items: Any = ()) -> set[Any]:
    for item in _require(items, list):
        _require_key(item)
    return set(items)


# Classes and functions that may be named besides tensors', and their replacements.
CONTAINERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _ordered,
    "builtins.set": _set_of,
    "builtins.complex": complex,
    "builtins.bytearray": lambda content=b"", *_: bytes(len(_require(content, (bytes, str)))),
    "_codecs.encode": _encoded,
    "torch.Size": lambda size=(): tuple(_require(size, (tuple, list))),
    "torch.device": lambda *_: "device",
}
# Opcodes that push a value: their argument, a constant, or an empty container.
PUSHED = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING"}
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
