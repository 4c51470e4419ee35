"""Reads files of weights as data: runs no code from them, and removes wrappers and prefixes.

Place in the flow: PATH -> RawWeights: tensors under the file's own names, and what came with them. Pickles are read
with `weights_only`; a pickle that names a function is refused before any of it runs.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from everest_ds.errors import UserError, escaped
from everest_ds.files import read_json_object
from everest_ds.model.weights.architecture import DECODER_MARKS, NO_METADATA, ModelMetadata
from everest_ds.model.weights.pickles import MAX_NAME_LENGTH, MAX_PICKLE_BYTES, read_pickle

# Keys of the state dict in files of training codes, in the order of the official fine-tuning code.
WRAPPERS = ("model", "module", "state_dict")
# Prefixes of names, added by data parallelism and DeepSpeed, by our tasks, and by official fine-tuning.
PREFIXES = ("module", "model", "backbone")
COMPILED = "_orig_mod"  # torch.compile adds it anywhere in a name
# Our files have `ModelMetadata` under this key: next to the state dict, or in safetensors' metadata.
METADATA_KEY = "everest_model"
# The run's configuration in safetensors' metadata.
RUN_CONFIG_KEY = "config"
CONFIG = "config.json"
MAX_HEADER_BYTES = MAX_PICKLE_BYTES  # of safetensors: names, shapes, and our texts
# For folders of other projects. DeepSpeed unpickles their files, and so does the script in such a folder.
CONSOLIDATE = "if you trust its origin, run `python -m deepspeed.utils.zero_to_fp32` on it"
DEEPSPEED_STATES = "mp_rank_00_model_states.pt"
# Official files store their arguments in one; creating it runs no code from the file.
ARGUMENTS = {"argparse.Namespace": argparse.Namespace}
# Weights of a Hugging Face folder, in the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True, kw_only=True)
class RawWeights:
    """Tensors as they are in a file.

    Attributes:
        tensors: By name, without prefixes.
        names: From those names to the names in the file, with prefixes.
        beside: What else is in the file: optimiser, epoch, arguments.
        metadata: The file's metadata about its model.
        config: The config.json of a Hugging Face folder.
        run_config: The configuration of the run that wrote the weights, one line of JSON; files of ours only.
        wrapper: The key of the state dict.
        notes: For the report.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    metadata: ModelMetadata = NO_METADATA
    config: dict[str, Any] | None = None
    run_config: str | None = None
    wrapper: str | None = None
    notes: tuple[str, ...] = ()


def read_raw(path: Path) -> RawWeights:
    """Read a file, or a folder of Hugging Face or of DeepSpeed, as data.

    Raises:
        UserError: It is missing, damaged, not a file of weights, a pickle that would run code, or has a tensor
            without values.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; expected a run, a checkpoint, a .pth, .pt or .safetensors file, or a Hugging "
            "Face folder"
        )
    raw = _remove_prefixes(_read_with_texts(path) if path.suffix == ".safetensors" else _read_wrapped(path), path)
    if path.name == DEEPSPEED_STATES and any(tensor.dtype != torch.float32 for tensor in raw.tensors.values()):
        return replace(raw, notes=(f"to get the float32 weights out of this folder, {CONSOLIDATE}",))
    config = path.parent / CONFIG
    if config.is_file() and any(name.startswith(("videomae.", "embeddings.")) for name in raw.tensors):
        return replace(raw, config=read_json_object(config))
    return raw


def _read_folder(path: Path) -> RawWeights:
    if (path / DEEPSPEED_STATES).is_file():
        return read_raw(path / DEEPSPEED_STATES)
    file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if file is not None:
        if not (path / CONFIG).is_file():
            raise UserError(f"{path} has weights but no {CONFIG}, which gives their number of heads; add it")
        tensors: dict[str, Tensor] = {}
        for shard in _list_shards(file) if file.suffix == ".json" else [file]:
            tensors |= _read_shard(shard)
        return _remove_prefixes(RawWeights(tensors=tensors, config=read_json_object(path / CONFIG)), path)
    if any(path.glob("zero_pp_rank_*_model_states.pt")):
        raise UserError(f"{path} is sharded by DeepSpeed at stage 3; first, {CONSOLIDATE}")
    expected = ", ".join((*WEIGHT_FILES, DEEPSPEED_STATES))
    raise UserError(f"{path} has no weights: expected a run, a complete checkpoint, or one of {expected} in it")


def _list_shards(index: Path) -> list[Path]:
    """Return the files that an index names; they must be in the index's folder."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensor names to file names; download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\0" in name:
            raise UserError(f"{index} names {escaped(name)!r}; expected files in its own folder")
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {escaped(name)}, which is missing; download the whole folder")
    return [index.parent / name for name in names]


def _read_shard(path: Path) -> dict[str, Tensor]:
    """Read one file of a Hugging Face folder."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    state = read_pickle(path, objects=ARGUMENTS)
    if not isinstance(state, Mapping) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{path} has values that are not tensors; expected a bare state dict")
    return dict(state)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors, and the texts in its metadata.

    Raises:
        UserError: It is damaged, its header is too large, or it is not a safetensors file.
    """
    try:
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise UserError(f"{path} cannot be read: its header claims {length} bytes, over {MAX_HEADER_BYTES}")
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            names = file.keys()
            for name in names:
                if len(name) > MAX_NAME_LENGTH:
                    raise UserError(f"{path} has a tensor name of {len(name)} characters, {escaped(name[:40])}...")
            return {name: file.get_tensor(name) for name in names}, texts
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {escaped(str(error))}") from error


def _read_with_texts(path: Path) -> RawWeights:
    tensors, texts = read_safetensors(path)
    if METADATA_KEY not in texts:
        return RawWeights(tensors=tensors)
    metadata = ModelMetadata.parse(texts[METADATA_KEY], str(path))
    return RawWeights(tensors=tensors, metadata=metadata, run_config=texts.get(RUN_CONFIG_KEY))


def _read_wrapped(path: Path) -> RawWeights:
    """Read a pickle and find the state dict in it; ``beside`` names the rest."""
    content = read_pickle(path, objects=ARGUMENTS)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} has a {type(content).__name__} in it; expected a state dict, bare or wrapped")
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
    state = content if wrapper is None else content[wrapper]
    tensors = {str(name): value for name, value in state.items() if torch.is_tensor(value)}
    if not tensors:
        shown = ", ".join(escaped(str(key)) for key in list(content)[:4])
        parts = [
            escaped(str(key))
            for key, value in content.items()
            if isinstance(value, Mapping) and any(torch.is_tensor(v) for v in value.values())
        ]
        nested = f". Its parts {', '.join(parts)} have tensors: save one of them as its own file" if parts else ""
        raise UserError(
            f"{path} has no tensors: it has {shown or 'nothing'}; expected a state dict, bare or under "
            f"{' or '.join(WRAPPERS)}{nested}"
        )
    beside = [str(key) for key in content if key != wrapper and str(key) not in tensors and key != METADATA_KEY]
    if wrapper is None:
        return RawWeights(tensors=tensors, beside=tuple(beside))
    beside += [f"{wrapper}.{name}" for name in state if str(name) not in tensors]
    metadata = _read_metadata(content, path)
    return RawWeights(tensors=tensors, beside=tuple(beside), metadata=metadata, wrapper=wrapper)


def _read_metadata(content: Mapping[Any, Any], path: Path) -> ModelMetadata:
    """Return a file's metadata about its model: our own key, else the official code's arguments."""
    if METADATA_KEY in content:
        return ModelMetadata.parse(content[METADATA_KEY], str(path))
    arguments = content.get("args")
    given = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    num_frames, edge = given.get("num_frames"), given.get("input_size")
    if type(num_frames) is not int or type(edge) is not int or min(num_frames, edge) < 1:
        return NO_METADATA
    return ModelMetadata(num_frames=num_frames, image_height=edge, image_width=edge)


def _remove_prefixes(raw: RawWeights, path: Path) -> RawWeights:
    """Remove wrappers' prefixes from names, and `encoder.` if there is no decoder."""
    for name, tensor in raw.tensors.items():
        if not tensor.numel():
            raise UserError(f"{path}: {escaped(name)} has no values, its shape is {tuple(tensor.shape)}")
    short_names = {name: _short_name(name) for name in raw.tensors}
    has_decoder = any(name.startswith(DECODER_MARKS) for name in short_names.values())
    names: dict[str, str] = {}
    for name, short in short_names.items():
        # Hugging Face's bare encoder calls its blocks encoder.layer; those names keep `encoder.`.
        if not has_decoder and not short.startswith("encoder.layer."):
            short = short.removeprefix("encoder.")
        if short in names:
            both = f"{escaped(names[short])} and {escaped(name)}"
            raise UserError(f"{path} has both {both}, which mean the same tensor; remove one")
        names[short] = name
    return replace(raw, tensors={short: raw.tensors[name] for short, name in names.items()}, names=names)


def _short_name(name: str) -> str:
    parts = [part for part in name.split(".") if part != COMPILED]
    while len(parts) > 1 and parts[0] in PREFIXES:
        parts = parts[1:]
    return ".".join(parts)
