"""Reads whole float32 weights from a checkpoint's shards, and loads them into a fresh model.

These are the float32 weights that the optimiser updates, not the model's bfloat16 copies.
"""

import contextlib
import io
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everest_ds.config import Config
from everest_ds.config.file import dump_config
from everest_ds.data.lists.classes import find_class_names
from everest_ds.distributed import World
from everest_ds.errors import UserError, escaped
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.sizes import get_size
from everest_ds.model.weights.architecture import ModelMetadata
from everest_ds.model.weights.export import save_safetensors, write_whole
from everest_ds.model.weights.foreign import METADATA_KEY
from everest_ds.model.weights.loading import load_weights
from everest_ds.model.weights.reading import Weights, read_weights, require_finite, weights_of_run
from everest_ds.model.weights.report import WeightsReport
from everest_ds.tokens import TokenGrid
from everest_ds.train.checkpoints.listing import STATE
from everest_ds.train.checkpoints.origin import locate
from everest_ds.train.checkpoints.run_config import read_config
from everest_ds.train.checkpoints.save import find_fault, read_state
from everest_ds.train.checkpoints.shards import as_data, find_code, read_shard
from everest_ds.train.tasks import Task, make_task

# In shards, the names of the task's model have this prefix; it is removed from weights.
PREFIX = "model."
ALONE = World(rank=0, local_rank=0, size=1, local_size=1)


def read_fp32_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return the float32 weights of a verified checkpoint of any stage, under the model's own names.

    Raises:
        UserError: A shard has more than data, or was not written by DeepSpeed.
    """
    fault = find_code(checkpoint, ALONE)
    if fault:
        raise UserError(fault)
    try:
        weights = _consolidate(checkpoint)
        return {name.removeprefix(PREFIX): tensor.detach().float().contiguous() for name, tensor in weights.items()}
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        if isinstance(error, UserError):
            raise
        first_line = escaped(str(error).strip().split("\n")[0])
        raise UserError(
            f"{checkpoint} has shards that do not match its {STATE}: {type(error).__name__}: {first_line}"
        ) from error


def _consolidate(checkpoint: Path) -> dict[str, Tensor]:
    """Return the float32 weights under the task's names."""
    state = read_state(checkpoint)
    if state.zero_stage == 0:
        weights = _unsharded_weights(checkpoint, state.dtype)
    elif state.zero_stage == 1 and state.dtype == "bfloat16":
        weights = _fragmented_weights(checkpoint, state.world_size)
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        quiet = io.StringIO()  # DeepSpeed prints much
        with as_data(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if state.zero_stage == 1:  # DeepSpeed (0.19.8) records frozen parameters only from stage 2 on
        weights = _read_states(checkpoint)["module"] | weights
    return weights


def _unsharded_weights(checkpoint: Path, dtype: str) -> dict[str, Tensor]:
    """Read a ZeRO-0 checkpoint; in bfloat16 the float32 weights are in the optimiser's groups, without names."""
    states = _read_states(checkpoint)
    weights: dict[str, Tensor] = states["module"]
    if dtype == "float32":
        return weights
    config = read_config(checkpoint.parent.parent, [checkpoint])
    with torch.device("meta"):
        task = make_task(config)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    for group, masters in zip(task.parameter_groups(), states["optimizer"]["fp32_groups"], strict=True):
        parameters: list[nn.Parameter] = group["params"]
        weights |= {names[id(p)]: master for p, master in zip(parameters, masters, strict=True)}
    return weights


def _fragmented_weights(checkpoint: Path, world_size: int) -> dict[str, Tensor]:
    """Read ZeRO-1 in bfloat16, which DeepSpeed's own consolidation (0.19.8) does not recognise.

    Each rank's shard has the places of the parameters' parts in its flat groups. A parameter's parts are in the
    order of ranks.
    """
    module = _read_states(checkpoint)["module"]
    parts: dict[str, list[Tensor]] = {}
    for rank in range(world_size):
        path = checkpoint / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        shard = read_shard(path, has_objects=True)["optimizer_state_dict"]
        groups, slices = shard["single_partition_of_fp32_groups"], shard["param_slice_mappings"]
        for flat, slice_of in zip(groups, slices, strict=True):
            for name, extent in slice_of.items():
                parts.setdefault(name, []).append(flat.narrow(0, extent.start, extent.numel))
    return {name: torch.cat(pieces).view(module[name].shape) for name, pieces in parts.items()}


def _read_states(checkpoint: Path) -> dict[str, Any]:
    """Read the states of ZeRO-0 to 2, which include the whole model in its own dtype."""
    states: dict[str, Any] = read_shard(checkpoint / "mp_rank_00_model_states.pt")
    return states


def restore_frozen_weights(task: Task, checkpoint: Path) -> None:
    """Load a task's frozen weights from a verified checkpoint; universal copies do not have them."""
    frozen = {name: p for name, p in task.named_parameters() if not p.requires_grad}
    if not frozen:
        return
    weights = read_fp32_weights(checkpoint)
    with torch.no_grad():
        for name, parameter in frozen.items():
            parameter.copy_(weights[name.removeprefix(PREFIX)])


def export_fp32(source: Path, target: Path) -> Path:
    """Write the float32 weights of a run (see `locate`), or of a checkpoint, as one safetensors file.

    Returns:
        The checkpoint that was read.

    Raises:
        UserError: The source is not a complete and undamaged checkpoint, its weights are not finite, or the target
            exists or cannot be written.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"{target} must end in .safetensors")
    if target.exists():
        raise UserError(f"{target} exists; remove it or name another file")
    origin = locate(source)
    if origin.config is None:
        raise UserError(f"{source} is neither a run directory nor a complete checkpoint")
    weights, metadata, text = _read_checkpoint(origin.weights, origin.config)
    notes = {"step": str(read_state(origin.weights).step), "config": text, METADATA_KEY: metadata.dump()}
    require_finite(weights, str(origin.weights))
    write_whole(target, lambda path: save_safetensors(weights, path, notes))
    return origin.weights


def _read_checkpoint(checkpoint: Path, config: Config) -> tuple[dict[str, Tensor], ModelMetadata, str]:
    """Return the weights of a checkpoint, its model's metadata, and its configuration in one line of JSON."""
    fault = find_fault(checkpoint, ALONE)
    if fault:
        raise UserError(f"checkpoint {checkpoint} is damaged: {fault}")
    metadata = metadata_of_run(config, find_class_names(checkpoint.parent.parent))
    return read_fp32_weights(checkpoint), metadata, json.dumps(json.loads(dump_config(config)))


def metadata_of_run(config: Config, labels: tuple[str, ...] | None = None) -> ModelMetadata:
    """Return the properties of a run's model that the shapes of its weights do not show."""
    size, model = get_size(config.model.size), config.model
    edge = model.position_size or config.data.image_size
    return ModelMetadata(
        num_heads=size.num_heads,
        decoder_num_heads=size.decoder_num_heads,
        num_frames=model.position_frames or config.data.num_frames,
        image_height=edge,
        image_width=edge,
        labels=labels,
    )


def read_any_weights(path: Path) -> Weights:
    """Read the weights of a run, a checkpoint, or anything that `everest_ds.model.weights.reading` reads.

    Raises:
        UserError: There are none, they are damaged, or their layout is not known.
    """
    origin = locate(path)
    if origin.config is None:
        return read_weights(path)
    weights, metadata, text = _read_checkpoint(origin.weights, origin.config)
    return weights_of_run(weights, metadata, str(origin.weights), config=text, checkpoint=origin.weights)


def load_initial_weights(
    model: EverestAutoencoder | EverestClassifier,
    path: Path,
    *,
    allow: Collection[str] = (),
    clip_grid: TokenGrid | None = None,
) -> WeightsReport:
    """Start a fresh model from weights of any origin; see `load_weights`.

    Raises:
        UserError: There are no such weights, or a difference from the model is not allowed by name.
    """
    return load_weights(model, read_any_weights(path), allow=allow, clip_grid=clip_grid)
