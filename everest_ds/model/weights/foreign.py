"""Files of weights, as data: read without running anything that is in them, unwrapped, prefixes taken off.

Place in the flow: PATH -> RawWeights (tensors under their own names, and what came with them). A pickle is read
with `weights_only`; one that names a function is refused before anything of it runs.
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everest_ds.config.file import read_json_object
from everest_ds.errors import UserError
from everest_ds.model.weights.architecture import DECODER_MARKS, NO_METADATA, ModelMetadata

# Keys under which training codes keep the state dict, in the order of the official fine-tuning code.
WRAPPERS = ("model", "module", "state_dict")
# Leading parts of names that wrappers add: data parallelism and DeepSpeed, our tasks, official fine-tuning.
PREFIXES = ("module", "model", "backbone")
COMPILED = "_orig_mod"  # torch.compile adds it, anywhere
# Where our files keep `ModelMetadata`: a key beside the state dict, or of safetensors' metadata.
METADATA_KEY = "everest_model"
# Where the configuration of the run stands that they are from, in safetensors' metadata.
RUN_CONFIG_KEY = "config"
CONFIG = "config.json"
DEEPSPEED_STATES = "mp_rank_00_model_states.pt"
# Weights of a Hugging Face folder, in the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True, kw_only=True)
class RawWeights:
    """Tensors as a file has them.

    Attributes:
        tensors: By name, prefixes taken off.
        names: The name in the file, prefixes and all, by that name.
        beside: What else is in the file: optimiser, epoch, arguments.
        facts: What the file says of its model.
        config: The config.json beside it, of a Hugging Face folder.
        run_config: The configuration of the run that they are from, one line of JSON, of a file of ours.
        wrapper: The key that the state dict stood under.
        notes: What else there is to know of the file.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str]
    beside: tuple[str, ...] = ()
    facts: ModelMetadata = NO_METADATA
    config: dict[str, Any] | None = None
    run_config: str | None = None
    wrapper: str | None = None
    notes: tuple[str, ...] = ()


def read_raw(path: Path) -> RawWeights:
    """Read a file, or a folder of Hugging Face or of DeepSpeed, as data.

    Raises:
        UserError: It is not there, is damaged or something else, or is a pickle that wants to run code.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; expected a run, a checkpoint, a .pth, .pt or .safetensors file, or a Hugging "
            "Face folder"
        )
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        facts = ModelMetadata.parse(metadata[METADATA_KEY], str(path)) if METADATA_KEY in metadata else NO_METADATA
        run_config = metadata.get(RUN_CONFIG_KEY) if METADATA_KEY in metadata else None
        raw = RawWeights(**_without_prefixes(tensors, path), facts=facts, run_config=run_config)
    else:
        raw = _unwrap(_read_pickle(path), path)
    if path.name == DEEPSPEED_STATES and any(tensor.dtype != torch.float32 for tensor in raw.tensors.values()):
        return replace(raw, notes=("DeepSpeed's zero_to_fp32.py gets the float32 weights out of this folder",))
    config = path.parent / CONFIG
    is_huggingface = any(name.startswith(("videomae.", "embeddings.")) for name in raw.tensors)
    return _with_config(raw, config) if is_huggingface and config.is_file() else raw


def _read_folder(path: Path) -> RawWeights:
    if (path / DEEPSPEED_STATES).is_file():
        return read_raw(path / DEEPSPEED_STATES)
    for name in WEIGHT_FILES:
        file = path / name
        if not file.is_file():
            continue
        if not (path / CONFIG).is_file():
            raise UserError(f"{path} has weights but no {CONFIG}, which says how many heads they have; add it")
        tensors: dict[str, Tensor] = {}
        for shard in _shards(file) if file.suffix == ".json" else [file]:
            tensors |= _tensors_of(shard)
        return _with_config(RawWeights(**_without_prefixes(tensors, path)), path / CONFIG)
    if any(path.glob("zero_pp_rank_*_model_states.pt")):
        raise UserError(f"{path} is sharded by DeepSpeed at stage 3; run the zero_to_fp32.py beside it first")
    expected = ", ".join((*WEIGHT_FILES, DEEPSPEED_STATES))
    raise UserError(f"{path} has no weights: expected a run, a complete checkpoint, or one of {expected} in it")


def _tensors_of(shard: Path) -> dict[str, Tensor]:
    """Read one file of a Hugging Face folder."""
    if shard.suffix == ".safetensors":
        return _read_safetensors(shard)[0]
    state = _read_pickle(shard)
    if not isinstance(state, Mapping) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{shard} holds something else than tensors; expected a bare state dict")
    return dict(state)


def _shards(index: Path) -> list[Path]:
    """Return the files of a sharded folder; they must lie in it."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map of names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}; expected files of its own folder")
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is not there; fetch the whole folder")
    return [index.parent / name for name in names]


def _with_config(raw: RawWeights, path: Path) -> RawWeights:
    return replace(raw, config=read_json_object(path))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return tensors, metadata


def _read_pickle(path: Path) -> Any:
    """Unpickle tensors and plain containers, and the official code's arguments; nothing else.

    `argparse.Namespace` is what official files keep their arguments in; making one runs no code of the file's.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        if named is None:
            raise UserError(f"{path} cannot be read as weights: no file of torch.save, or a damaged one") from error
        raise UserError(
            f"{path} is a pickle that wants to run code when it is read ({named[1]}); refused, nothing was run. "
            "Weights are read as data only: where you trust its origin, save its state dict alone, by "
            "torch.save({'model': state_dict}, ...)"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{path} cannot be read as weights: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _unwrap(content: Any, path: Path) -> RawWeights:
    """Find the state dict in what a file holds; the rest is named."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a state dict, bare or wrapped")
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
    state = content if wrapper is None else content[wrapper]
    tensors = {str(name): value for name, value in state.items() if torch.is_tensor(value)}
    beside = [str(key) for key in content if key != wrapper and str(key) not in tensors and key != METADATA_KEY]
    if wrapper is not None:
        beside += [f"{wrapper}.{name}" for name in state if str(name) not in tensors]
    if not tensors:
        shown = ", ".join(str(key) for key in list(content)[:4])
        parts = [str(key) for key, value in content.items() if isinstance(value, Mapping) and _has_tensors(value)]
        nested = f". Its parts {', '.join(parts)} hold tensors: save the one that you want alone" if parts else ""
        raise UserError(
            f"{path} holds no tensors: it has {shown or 'nothing'}; expected a state dict, bare or under "
            f"{' or '.join(WRAPPERS)}{nested}"
        )
    facts = _facts_beside(content, path) if wrapper is not None else NO_METADATA
    return RawWeights(**_without_prefixes(tensors, path), beside=tuple(beside), facts=facts, wrapper=wrapper)


def _has_tensors(state: Mapping[Any, Any]) -> bool:
    return any(torch.is_tensor(value) for value in state.values())


def _facts_beside(content: Mapping[Any, Any], path: Path) -> ModelMetadata:
    """Return what a file says of its model: our own key, else the official code's arguments."""
    if METADATA_KEY in content:
        return ModelMetadata.parse(content[METADATA_KEY], str(path))
    arguments = content.get("args")
    given = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    num_frames, edge = given.get("num_frames"), given.get("input_size")
    if type(num_frames) is not int or type(edge) is not int or min(num_frames, edge) < 1:
        return NO_METADATA
    return ModelMetadata(num_frames=num_frames, image_height=edge, image_width=edge)


def _without_prefixes(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Take wrappers' parts off names; `encoder.` too where there is no decoder for it to stand beside.

    Returns:
        Arguments of `RawWeights`.
    """
    plain = {name: _plain(name) for name in tensors}
    if not any(name.startswith(DECODER_MARKS) for name in plain.values()):
        # Hugging Face's bare encoder calls its blocks encoder.layer: those keep the part.
        plain = {
            name: short if short.startswith("encoder.layer.") else short.removeprefix("encoder.")
            for name, short in plain.items()
        }
    names: dict[str, str] = {}
    for name, short in plain.items():
        if short in names:
            raise UserError(f"{path} has both {names[short]} and {name}, which mean the same tensor; remove one")
        names[short] = name
    return {"tensors": {short: tensors[name] for short, name in names.items()}, "names": names}


def _plain(name: str) -> str:
    parts = [part for part in name.split(".") if part != COMPILED]
    while len(parts) > 1 and parts[0] in PREFIXES:
        parts = parts[1:]
    return ".".join(parts)
