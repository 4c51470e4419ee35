"""The DeepSpeed engine: how a run is sharded, and every setting that changes what it computes.

A file of ds_configs/ holds systems only: ZeRO stage, dtype, buckets, offload, communication. Batch, accumulation,
clipping and the optimiser come from the configuration; a file that gives one of them too is refused. What matters
for the result is written out here, because DeepSpeed's own defaults change between versions (gradient_clipping was
0.0 and is 1.0).
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everest_ds import distributed
from everest_ds.config import Config
from everest_ds.config_file import read_json_object
from everest_ds.errors import UserError, nearest_hint
from everest_ds.model.compilation import compile_obstacle
from everest_ds.train.optim import make_optimizer
from everest_ds.train.precision import BF16, PrecisionName, choose_precision, precision_sections
from everest_ds.train.tasks import Task

Systems = dict[str, Any]

# Used when no file is given; ds_configs/zero2.json adds buckets and overlap.
DEFAULT_SYSTEMS: Systems = {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}}
DTYPE_NAMES = ("fp32", "bf16")
SECTIONS = ("zero_optimization", "bf16", "data_types")

SYSTEMS_KEYS = frozenset(
    {
        "aio",
        "bf16",
        "comms_logger",
        "communication_data_type",
        "data_types",
        "flops_profiler",
        "memory_breakdown",
        "wall_clock_breakdown",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
RECIPE_KEYS = {
    "fp16": "float16 needs loss scaling, which is not supported; use bf16",
    "gradient_accumulation_steps": "it follows from batch.global_size, batch.micro_size and the processes",
    "gradient_clipping": "it is optim.max_grad_norm",
    "optimizer": "it is in optim.*",
    "scheduler": "it is in optim.*",
    "tensorboard": "metrics.jsonl and RUN/tensorboard/ are written in any case",
    "torch_autocast": "it is --precision autocast",
    "train_batch_size": "it is batch.global_size",
    "train_micro_batch_size_per_gpu": "it is batch.micro_size",
}


def load_systems(path: Path | None) -> Systems:
    """Read a file of ds_configs/, or return the default (plain ZeRO-2) for None.

    Raises:
        UserError: The file is missing or no JSON object, or has a key that is unknown or the recipe's.
    """
    if path is None:
        return copy.deepcopy(DEFAULT_SYSTEMS)
    raw = read_json_object(path)
    for key in raw:
        if key in RECIPE_KEYS:
            raise UserError(f"{path}: {key} does not belong into a systems file: {RECIPE_KEYS[key]}")
        if key not in SYSTEMS_KEYS:
            raise UserError(f"{path}: unknown key {key}{nearest_hint(key, SYSTEMS_KEYS)}")
        if key in SECTIONS and not isinstance(raw[key], dict):
            raise UserError(f"{path}: {key}={raw[key]!r} must be an object")
    dtypes = {"communication_data_type": raw.get("communication_data_type", "fp32")}
    for name, dtype in (raw.get("data_types", {}) | dtypes).items():
        if name not in ("grad_accum_dtype", "communication_data_type") or dtype not in DTYPE_NAMES:
            raise UserError(
                f"{path}: {name}={dtype!r}; known: grad_accum_dtype, communication_data_type, each fp32 or bf16"
            )
    return raw


def check_sections(systems: Systems, source: str) -> None:
    """Have DeepSpeed check the sections that it knows the options of, before anything is built.

    Raises:
        UserError: DeepSpeed does not know an option, a value does not fit, or offloading lacks its op.
    """
    distributed.select_accelerator()
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    for section, schema in (("zero_optimization", DeepSpeedZeroConfig), ("bf16", DeepSpeedBF16Config)):
        try:
            schema(**systems.get(section, {}))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{source}: {section}.{where}: {first['msg']}") from error
    _check_offload(systems, source)


def _check_offload(systems: Systems, source: str) -> None:
    """Refuse offloading that would need an op of DeepSpeed's which this trainer does not build."""
    zero = systems.get("zero_optimization", {})
    for section in ("offload_optimizer", "offload_param"):
        device = (zero.get(section) or {}).get("device", "none")
        if device == "nvme":
            raise UserError(
                f"{source}: {section}.device=nvme needs DeepSpeed's async_io op, and its files are not part of our "
                "checkpoints; use cpu"
            )
    if "offload_optimizer" in zero and systems.get("zero_force_ds_cpu_optimizer"):
        raise UserError(
            f"{source}: zero_force_ds_cpu_optimizer=true asks for DeepSpeed's CPU Adam op; set it to false, and "
            "torch's AdamW updates the offloaded states"
        )


def check_compilation(config: Config, systems: Systems, device_type: str) -> None:
    """Refuse compiled blocks where they cannot serve, before anything is built.

    Raises:
        UserError: model.compile_blocks at ZeRO-3, or on a machine that cannot compile.
    """
    if not config.model.compile_blocks:
        return
    if zero_stage(systems) == 3:
        raise UserError(
            "model.compile_blocks=True cannot serve at ZeRO-3: weights are gathered by hooks of the modules, which "
            "compiled code does not call; use ZeRO-0, 1 or 2, or model.compile_blocks=False"
        )
    obstacle = compile_obstacle(device_type)
    if obstacle is not None:
        raise UserError(f"model.compile_blocks=True cannot serve: {obstacle}, or use model.compile_blocks=False")


def resolve_ds_config(
    systems: Systems, config: Config, *, world_size: int, precision: PrecisionName, device_type: str
) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration of a run.

    Raises:
        UserError: The batch cannot be made from micro-batches on this many processes, or see `choose_precision`.
    """
    resolved = copy.deepcopy(systems)
    chosen = choose_precision(systems, precision, device_type)
    if chosen != BF16:
        resolved.pop("data_types", None)  # float32 accumulates in float32
    resolved |= precision_sections(systems, chosen)
    resolved |= {
        "train_batch_size": config.batch.global_size,
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": config.batch.accumulation_steps(world_size),
        "gradient_clipping": config.optim.max_grad_norm,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": systems.get("zero_force_ds_cpu_optimizer", False),
        "steps_per_print": 10**9,
        "wall_clock_breakdown": systems.get("wall_clock_breakdown", False),
    }
    return resolved


def zero_stage(ds_config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def build_engine(
    task: Task, config: Config, ds_config: dict[str, Any], device: torch.device, *, universal: bool = False
) -> Any:
    """Return the DeepSpeed engine around a task, with torch's AdamW.

    Args:
        task: What turns a batch into a loss.
        config: The run.
        ds_config: As `resolve_ds_config` returns it.
        device: This process's.
        universal: Whether the engine is to load a universal checkpoint instead of shards of its own kind.
    """
    import logging

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    offloaded = "offload_optimizer" in ds_config.get("zero_optimization", {})
    optimizer_device = torch.device("cpu") if offloaded else device
    if ds_config["torch_autocast"]["enabled"]:
        # A pass uses each weight once: a cache would only keep the casts of those that are cast again in backward.
        torch.set_autocast_cache_enabled(False)
    groups = task.parameter_groups()
    expected = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    engine, *_ = deepspeed.initialize(
        model=task,
        optimizer=make_optimizer(groups, config.optim, optimizer_device),
        config={**ds_config, "checkpoint": {"load_universal": universal}},
        dist_init_required=False,
    )
    found = [(group["lr_scale"], group["weight_decay"]) for group in engine.optimizer.param_groups]
    if found != expected:
        raise RuntimeError(f"DeepSpeed changed the parameter groups: {found}, expected {expected}")
    if zero_stage(ds_config) == 0 and ds_config["bf16"]["enabled"]:
        # DeepSpeed 0.19.8 makes the moments by a step on zero gradients here, and leaves the step counted: AdamW's
        # bias correction would be off by one for the whole run.
        for state in engine.optimizer.optimizer.state.values():
            state["step"].zero_()
    return engine


def set_learning_rate(engine: Any, value: float) -> None:
    """Set the learning rate of every parameter group: the schedule's value times the group's own scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What became of a micro-step.

    Attributes:
        grad_norm: Global gradient norm before clipping; None while accumulation goes on.
        applied: False when a gradient was not finite, so that no weight was changed.
    """

    grad_norm: Tensor | float | None = None
    applied: bool = True


def step(engine: Any) -> StepResult:
    """Take an optimiser step where accumulation is complete and every gradient finite.

    Under ZeRO, DeepSpeed looks at the gradients of all ranks and discards the step. Stage 0 in float32 runs the
    bare optimiser, which does neither that nor report a norm, so both happen here between reduction and step.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return StepResult()
    skipped_before = engine.skipped_steps
    norm = None
    clipping: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if not hasattr(engine.optimizer, "_global_grad_norm"):
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
        if not norm.isfinite():
            engine.optimizer.zero_grad()  # without gradients the optimiser leaves weights and moments alone
            engine.skipped_steps += 1
            clipping = _without_clipping(engine)
    with clipping:
        engine.step()
    norm = engine.get_global_grad_norm() if norm is None else norm
    return StepResult(grad_norm=norm, applied=engine.skipped_steps == skipped_before)


@contextlib.contextmanager
def _without_clipping(engine: Any) -> Iterator[None]:
    """Clip nothing: DeepSpeed 0.19.8 fails to clip where no parameter has a gradient."""
    before, engine._config.gradient_clipping = engine._config.gradient_clipping, 0.0
    try:
        yield
    finally:
        engine._config.gradient_clipping = before
