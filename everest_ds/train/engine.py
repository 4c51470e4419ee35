"""Builds the DeepSpeed engine and its complete configuration.

A file of ds_configs/ has only systems settings: ZeRO stage, dtype, buckets, offload, communication. Batch,
accumulation, clipping and the optimiser come from the recipe; a file that sets one of them is refused. Every
setting that affects the result is set here, because DeepSpeed's defaults change between versions (gradient_clipping
was 0.0 and is now 1.0).
"""

import copy
import importlib
import logging
from pathlib import Path
from typing import Any

import torch

from everest_ds import distributed
from everest_ds.config import Config
from everest_ds.errors import UserError, nearest_hint
from everest_ds.files import read_json_object
from everest_ds.model.transformer import compile_obstacle
from everest_ds.train.precision import BF16, PrecisionName, choose_precision, precision_sections
from everest_ds.train.step.optim import make_optimizer
from everest_ds.train.tasks import Task

PACKAGE = Path(__file__).resolve().parents[1]
# In an installed package, and in a checkout of the source.
FOLDERS = (PACKAGE / "ds_configs", PACKAGE.parent / "ds_configs")


Systems = dict[str, Any]


def shipped_files() -> dict[str, Path]:
    """Return the systems files by name, in the order zero0 to zero3_offload; those of the current folder first."""
    folder = next((folder for folder in (Path("ds_configs"), *FOLDERS) if (folder / "zero0.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"no ds_configs in {' or '.join(map(str, FOLDERS))}")
    return {path.stem: path for path in sorted(folder.glob("zero*.json"))}


def shipped_systems() -> dict[str, Systems]:
    return {name: load_systems(path) for name, path in shipped_files().items()}


# Used when no file is given; ds_configs/zero2.json adds buckets and overlap.
DEFAULT_SYSTEMS: Systems = {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}}
DTYPE_NAMES = ("fp32", "bf16")
SECTIONS = ("zero_optimization", "bf16", "data_types")

SYSTEMS_KEYS = {
    "aio", "bf16", "comms_logger", "communication_data_type", "data_types", "flops_profiler", "memory_breakdown",
    "wall_clock_breakdown", "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
RECIPE_KEYS = {
    "fp16": "float16 needs loss scaling, which is not supported; use bf16",
    "gradient_accumulation_steps": "it is computed from batch.global_size, batch.micro_size and the processes",
    "gradient_clipping": "it is optim.max_grad_norm",
    "optimizer": "it is in optim.*",
    "scheduler": "it is in optim.*",
    "tensorboard": "metrics.jsonl is always written, and run.log_to chooses where else metrics go",
    "torch_autocast": "it is --precision autocast",
    "train_batch_size": "it is batch.global_size",
    "train_micro_batch_size_per_gpu": "it is batch.micro_size",
}


def load_systems(path: Path | None) -> Systems:
    """Read a file of ds_configs/, or return the default (plain ZeRO-2) for None.

    ``ds_configs/NAME.json`` is the file of the installed package where the current folder has none.

    Raises:
        UserError: The file is missing or not a JSON object, or has a key that is unknown or belongs to the recipe.
    """
    if path is None:
        return copy.deepcopy(DEFAULT_SYSTEMS)
    if path.parent == Path("ds_configs") and not path.exists():
        path = next((folder / path.name for folder in FOLDERS if (folder / path.name).is_file()), path)
    raw = read_json_object(path)
    for key in raw:
        if key in RECIPE_KEYS:
            raise UserError(f"{path}: {key} does not belong in a DeepSpeed file: {RECIPE_KEYS[key]}")
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
    """Let DeepSpeed check its sections before anything is built.

    Raises:
        UserError: DeepSpeed does not know an option, a value is invalid, master weights would be bfloat16, or
            offloading needs an op that is not built.
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
    bf16 = DeepSpeedBF16Config(**systems.get("bf16", {}))
    # DeepSpeed allows the latter only with the former.
    if bf16.bf16_master_weights_and_grads or bf16.bf16_optimizer_states:
        raise UserError(
            f"{source}: bf16.bf16_master_weights_and_grads and bf16.bf16_optimizer_states keep master weights in "
            "bf16, where small updates are rounded away; remove both, as ZeRO shards float32 masters"
        )
        # An update of 3e-4, a peak rate of the paper's, never moves a norm's gain from 1; one of 1e-5 moves only 7
        # % of the matrices' weights.
    _check_offload(systems, source)


def _check_offload(systems: Systems, source: str) -> None:
    """Refuse offloading that needs a compiled DeepSpeed op."""
    zero = systems.get("zero_optimization", {})
    for section in ("offload_optimizer", "offload_param"):
        device = (zero.get(section) or {}).get("device", "none")
        if device == "nvme":
            raise UserError(
                f"{source}: {section}.device=nvme needs DeepSpeed's async_io op, and its files are not part of "
                "checkpoints; use cpu"
            )
    if "offload_optimizer" in zero and systems.get("zero_force_ds_cpu_optimizer"):
        raise UserError(
            f"{source}: zero_force_ds_cpu_optimizer=true needs DeepSpeed's CPU Adam op; set it to false, so that "
            "torch's AdamW updates the offloaded states"
        )


def check_compilation(config: Config, systems: Systems, device_type: str) -> None:
    """Refuse compiled blocks at ZeRO-3, and on a machine that cannot compile."""
    if not config.model.compile_blocks:
        return
    if zero_stage(systems) == 3:
        raise UserError(
            "model.compile_blocks=True is not available at ZeRO-3: compiled code does not call the modules' hooks, "
            "which gather the weights; use ZeRO-0, 1 or 2, or model.compile_blocks=False"
        )
    obstacle = compile_obstacle(device_type)
    if obstacle is not None:
        raise UserError(
            f"model.compile_blocks=True is not available: {obstacle}, or use model.compile_blocks=False"
        )


def resolve_ds_config(
    systems: Systems, config: Config, *, world_size: int, precision: PrecisionName, device_type: str
) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration of a run.

    Raises:
        UserError: The batch cannot be divided into micro-batches on this many processes; see also
            `choose_precision`.
    """
    resolved = copy.deepcopy(systems)
    chosen = choose_precision(systems, precision, device_type)
    if chosen != BF16:
        resolved.pop("data_types", None)  # float32 accumulates in float32
    if world_size == 1 and 1 <= zero_stage(resolved) <= 2:
        # There is no communication to overlap, and DeepSpeed would synchronise at every bucket.
        resolved["zero_optimization"]["overlap_comm"] = False
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
        # DeepSpeed's timer synchronises twice a step; the loop measures time itself.
        "timers": {"throughput": {"enabled": False}},
        "wall_clock_breakdown": systems.get("wall_clock_breakdown", False),
    }
    return resolved


def zero_stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def build_engine(
    task: Task, config: Config, ds_config: dict[str, Any], device: torch.device, *, universal: bool = False
) -> Any:
    """Return the DeepSpeed engine around a task, with torch's AdamW.

    Args:
        task: Turns a batch into a loss.
        config: The run.
        ds_config: As `resolve_ds_config` returns it.
        device: This rank's device.
        universal: Whether the engine will load a universal checkpoint instead of its own kind of shards.
    """
    import deepspeed
    from deepspeed.utils import logger

    _import_muon_uncompiled()
    logger.setLevel(logging.ERROR)
    if ds_config["torch_autocast"]["enabled"]:
        # Each pass uses a weight once, so a cache would only keep casts that are not used again.
        torch.set_autocast_cache_enabled(False)
    groups = task.parameter_groups()
    expected = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    engine, *_ = deepspeed.initialize(
        model=task,
        optimizer=make_optimizer(groups, config.optim),
        config={**ds_config, "checkpoint": {"load_universal": universal}},
        dist_init_required=False,
    )
    found = [(group["lr_scale"], group["weight_decay"]) for group in engine.optimizer.param_groups]
    if found != expected:
        raise RuntimeError(f"DeepSpeed changed the parameter groups: {found}, expected {expected}")
    if zero_stage(ds_config) == 0 and ds_config["bf16"]["enabled"]:
        # Here DeepSpeed 0.19.8 creates the moments by a step with zero gradients, and counts that step. AdamW's
        # bias correction would be off by one for the whole run.
        for state in engine.optimizer.optimizer.state.values():
            state["step"].zero_()
    return engine


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimiser without the compiler, which takes a second to load.

    DeepSpeed 0.19.8 imports Muon to check whether our optimiser is one. Three of Muon's functions are decorated
    with torch.compile, which loads torch._inductor.
    """
    from deepspeed.runtime import compiler

    compile_of_deepspeed = compiler.compile
    compiler.compile = lambda *args, **kwargs: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_of_deepspeed


def set_learning_rate(engine: Any, value: float) -> None:
    """Set the learning rate of every parameter group: the schedule's value times the group's own scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)
