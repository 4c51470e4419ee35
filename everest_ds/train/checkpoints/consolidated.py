"""Whole float32 weights out of a checkpoint's shards, and into a fresh model.

What is read is what the optimiser updates: the float32 weights, not the bfloat16 copies that a model computes with.
"""

import contextlib
import io
import json
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from everest_ds.config import Config
from everest_ds.config.file import dump_config, load_config
from everest_ds.data.lists.classes import find_class_names
from everest_ds.distributed import World
from everest_ds.errors import UserError
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
from everest_ds.train.checkpoints.origin import locate
from everest_ds.train.checkpoints.save import read_state
from everest_ds.train.checkpoints.seal import find_damage
from everest_ds.train.tasks import Task, make_task

# DeepSpeed wraps the task, whose model carries this prefix in shards; weights leave without it.
PREFIX = "model."
ALONE = World(rank=0, local_rank=0, size=1, local_size=1)


def _require_sound(checkpoint: Path) -> None:
    fault = find_damage(checkpoint, ALONE)
    if fault:
        raise UserError(f"checkpoint {checkpoint} is damaged: {fault}")


def read_fp32_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return the float32 weights of a verified checkpoint, whatever its stage, under the model's own names."""
    state = read_state(checkpoint)
    if state.zero_stage == 0:
        weights = _unsharded_weights(checkpoint, state.dtype)
    elif state.zero_stage == 1 and state.dtype == "bfloat16":
        weights = _fragmented_weights(checkpoint, state.world_size)
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        quiet = io.StringIO()  # it prints its inner life
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if state.zero_stage == 1:  # DeepSpeed (0.19.8) notes frozen parameters from stage 2 on
        weights = _read_module(checkpoint) | weights
    return {name.removeprefix(PREFIX): tensor.detach().float().contiguous() for name, tensor in weights.items()}


def _unsharded_weights(checkpoint: Path, dtype: str) -> dict[str, Tensor]:
    """Read a ZeRO-0 checkpoint; in bfloat16 the float32 weights stand in the optimiser's groups, without names."""
    states = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    weights: dict[str, Tensor] = states["module"]
    if dtype == "float32":
        return weights
    config = load_config(checkpoint.parent.parent / "config.json")
    with torch.device("meta"):
        task = make_task(config)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    for group, masters in zip(task.parameter_groups(), states["optimizer"]["fp32_groups"], strict=True):
        parameters: list[nn.Parameter] = group["params"]
        weights |= {names[id(p)]: master for p, master in zip(parameters, masters, strict=True)}
    return weights


def _fragmented_weights(checkpoint: Path, world_size: int) -> dict[str, Tensor]:
    """Read ZeRO-1 in bfloat16, whose shards DeepSpeed's own consolidation (0.19.8) takes for no ZeRO checkpoint.

    Each rank's shard says where in its flat groups which part of a parameter lies; parts follow in rank order.
    """
    module = _read_module(checkpoint)
    parts: dict[str, list[Tensor]] = {}
    for rank in range(world_size):
        path = checkpoint / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        shard = torch.load(path, map_location="cpu", weights_only=False)["optimizer_state_dict"]
        for flat, places in zip(
            shard["single_partition_of_fp32_groups"], shard["param_slice_mappings"], strict=True
        ):
            for name, place in places.items():
                parts.setdefault(name, []).append(flat.narrow(0, place.start, place.numel))
    return {name: torch.cat(pieces).view(module[name].shape) for name, pieces in parts.items()}


def _read_module(checkpoint: Path) -> dict[str, Tensor]:
    """Read the whole model, in the model's precision, that ZeRO-0 to 2 write beside the optimiser's shards."""
    states = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    module: dict[str, Tensor] = states["module"]
    return module


def restore_frozen_weights(task: Task, checkpoint: Path) -> None:
    """Bring a task's frozen weights, if it has any, to those of a verified checkpoint, before its engine is made.

    DeepSpeed's universal checkpoints hold what the optimiser updates and nothing else.
    """
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
        UserError: The source is no complete, sound checkpoint, its weights are not finite, or the target exists or
            cannot be written.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"{target} must end in .safetensors")
    if target.exists():
        raise UserError(f"{target} exists; remove it or name another file")
    origin = locate(source)
    checkpoint, config = origin.weights, origin.config
    if config is None:
        raise UserError(f"{source} is neither a run directory nor a complete checkpoint")
    _require_sound(checkpoint)
    facts = {
        "step": str(read_state(checkpoint).step),
        "config": _one_line(config),
        METADATA_KEY: metadata_of_run(config, find_class_names(checkpoint.parent.parent)).dump(),
    }
    weights = read_fp32_weights(checkpoint)
    require_finite(weights, str(checkpoint))
    write_whole(target, lambda path: save_safetensors(weights, path, facts))
    return checkpoint


def _one_line(config: Config) -> str:
    return json.dumps(json.loads(dump_config(config)))


def metadata_of_run(config: Config, labels: tuple[str, ...] | None = None) -> ModelMetadata:
    """Return what a run says of its model and its weights do not: its configuration, and its classes' names."""
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
    checkpoint, config = origin.weights, origin.config
    if config is None:
        return read_weights(path)
    _require_sound(checkpoint)
    facts = metadata_of_run(config, find_class_names(checkpoint.parent.parent))
    weights, text = read_fp32_weights(checkpoint), _one_line(config)
    return weights_of_run(weights, facts, str(checkpoint), config=text, checkpoint=checkpoint)


def load_initial_weights(
    model: EverestAutoencoder | EverestClassifier,
    path: Path,
    *,
    allow: Collection[str] = (),
    clip_grid: TokenGrid | None = None,
) -> WeightsReport:
    """Start a fresh model from weights of any origin; see `load_weights`.

    Raises:
        UserError: There are no such weights, or what differs from the model is not allowed by name.
    """
    return load_weights(model, read_any_weights(path), allow=allow, clip_grid=clip_grid)
