"""Weights out: one safetensors file, the official layout, or a folder that Hugging Face's `from_pretrained` loads.

Place in the flow: complete Weights -> `write_weights` -> new files, each written completely or not at all.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from everest_ds.config import Config
from everest_ds.errors import UserError
from everest_ds.files import atomic_path
from everest_ds.model.weights.foreign import METADATA_KEY, RUN_CONFIG_KEY
from everest_ds.model.weights.hub_folder import make_hub_folder
from everest_ds.model.weights.huggingface import to_huggingface
from everest_ds.model.weights.reading import Weights

Layout = Literal["everest", "videomae", "hf"]
SUFFIXES: dict[Layout, tuple[str, ...]] = {"everest": (".safetensors",), "videomae": (".pth", ".pt")}


def require_target(target: Path, layout: Layout) -> None:
    """Refuse a target that exists or is named for another layout, before any slow work."""
    if target.exists():
        raise UserError(f"{target} exists; remove it or name another")
    if layout == "hf" and target.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        raise UserError(f"{target} is named like a file; a Hugging Face model is a folder, so name a folder")
    if layout != "hf" and target.suffix not in SUFFIXES[layout]:
        raise UserError(f"{target} must end in {' or '.join(SUFFIXES[layout])}")


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written: pairs of source names and written names, one row for all blocks, and notes."""

    key_map: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


def write_weights(
    weights: Weights, target: Path, layout: Layout, *, recipe: Config | None = None, scores: Sequence[str] = ()
) -> Written:
    """Write the weights of one whole model.

    Args:
        weights: From `everest_ds.model.weights.reading.require_complete`.
        target: A new file, or a new folder for hf.
        layout: everest: our names in one float32 safetensors file, with metadata and the configuration of the run;
            videomae: the official state dict under 'model'; hf: model.safetensors, config.json, settings of
            transformers' processors, a model card, and for a classifier whose selection is known the code that
            selects tokens and frames in transformers.
        recipe: For hf: how clips are cut and which tokens are kept, for weights that come without a run.
        scores: For hf: recorded scores of the weights, a line each.

    Raises:
        UserError: The target exists or cannot be written, the layout does not support this model, or the recipe has
            no effect.
    """
    require_target(target, layout)
    architecture = weights.architecture
    metadata = architecture.metadata().dump()
    sources: Mapping[str, tuple[str, ...]] = {name: (name,) for name in weights.tensors}
    notes: tuple[str, ...] = ()
    if layout == "everest":
        texts = {METADATA_KEY: metadata} | ({} if weights.config is None else {RUN_CONFIG_KEY: weights.config})
        write_whole(target, lambda path: save_safetensors(weights.tensors, path, texts))
    elif layout == "videomae":
        layers = architecture.options.embedding_layers
        if layers > 1:
            raise UserError(
                f"the tubelet embedding has {layers} layers, the official layout has one; convert to everest "
                "instead"
            )
        write_whole(target, lambda path: torch.save({"model": weights.tensors, METADATA_KEY: metadata}, path))
    else:
        if not architecture.grid_is_known and recipe is not None:
            architecture = replace(architecture, grid=recipe.position_grid, grid_is_known=True)
            weights = replace(weights, architecture=architecture)
        translated = to_huggingface(weights.tensors, architecture)
        folder = make_hub_folder(weights, recipe, scores, translated.notes)
        sources, notes = translated.sources, folder.notes
        write_whole(target, lambda path: _save_folder(translated.tensors, folder.files, path))
    return Written(key_map=tuple(_map_keys(weights, sources)), notes=notes)


def _map_keys(weights: Weights, sources: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """Return pairs of names, read and written, with one row for all blocks."""
    rows: dict[tuple[str, str], None] = {}
    for written, ours in sources.items():
        read = [name for our in ours for name in weights.sources.get(our, (our,))]
        pair = " + ".join(read) or "(zeros)", written
        rows[_hide_numbers(pair[0]), _hide_numbers(pair[1])] = None
    return list(rows)


def _hide_numbers(names: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".N", names)


def save_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write one safetensors file, marked as torch's, with the mode that the umask gives."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    path.chmod(mode)  # safetensors (0.8) makes its files readable by their owner only


def _save_folder(tensors: Mapping[str, Tensor], files: Mapping[str, str], path: Path) -> None:
    path.mkdir()
    save_safetensors(tensors, path / "model.safetensors", {})
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")


def write_whole(target: Path, save: Callable[[Path], None]) -> None:
    """Write a file or folder completely or not at all.

    Raises:
        UserError: It cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as partial:
            save(partial)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk raises any of these
        raise UserError(f"cannot write {target}: {error}") from error
