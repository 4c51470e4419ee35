"""The sizes of a model and a DeepSpeed configuration that decide how much memory and traffic a run needs.

Place in the flow: `planning.states` and `planning.memory` compute with them. DeepSpeed is not imported.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from everest_ds.config import BatchConfig, Config, FinetuneConfig, GradientsName
from everest_ds.train.precision import BF16, FP32, precision_of
from everest_ds.train.step.gradients import choose_gradients
from everest_ds.train.tasks import make_task

FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2
# DeepSpeed's own defaults (runtime/zero/config.py).
DEFAULT_REUSE = 1_000_000_000
DEFAULT_PERSISTENCE = 100_000
# Classes of Kinetics-400, assumed where a fine-tuning configuration has no number of classes yet.
ASSUMED_CLASSES = 400
# Flat buffers are padded to a multiple of this many elements per process (nccl_start_alignment_factor).
ALIGNMENT = 2
# Options that the arithmetic below considers, and options that do not change the memory.
KNOWN_OPTIONS = frozenset(
    {
        "stage", "overlap_comm", "contiguous_gradients", "reduce_bucket_size", "allgather_bucket_size",
        "reduce_scatter", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save",
        "offload_optimizer", "offload_param",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Elements of the model.

    Attributes:
        groups: Elements of each trained parameter, by optimiser group.
        buffers: Elements of the buffers (position tables).
        frozen: Elements of each parameter that is not trained: no gradient, no optimiser states.
    """

    groups: tuple[tuple[int, ...], ...]
    buffers: int
    frozen: tuple[int, ...] = ()

    @property
    def trained(self) -> list[int]:
        return [count for group in self.groups for count in group]

    @property
    def total(self) -> int:
        return sum(self.trained) + sum(self.frozen)

    def aligned(self, world_size: int) -> list[int]:
        """Elements of each group's flat buffer."""
        unit = ALIGNMENT * world_size
        return [-(-sum(group) // unit) * unit for group in self.groups]

    def partitioned(self, world_size: int) -> list[int]:
        """Elements of each group on one process at stage 3, which splits every parameter separately."""
        return [sum(-(-count // world_size) for count in group) for group in self.groups]

    def touching(self, world_size: int) -> int:
        """Elements of the parameters that are at least partly in one process's partition; the largest such sum."""
        touched = [0] * world_size
        for group, flat in zip(self.groups, self.aligned(world_size), strict=True):
            partition, start = flat // world_size, 0
            for count in group:
                for rank in range(start // partition, (start + count - 1) // partition + 1):
                    touched[rank] += count
                start += count
        return max(touched)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """The parts of a resolved DeepSpeed configuration that decide the memory.

    Attributes:
        stage: ZeRO stage.
        model_bytes: Bytes of a parameter in the model.
        matmul_bytes: Bytes of a number in matmuls and attention.
        accumulation_bytes: Bytes of an accumulated gradient.
        communication_bytes: Bytes of a gradient when it is sent.
        options: The section ``zero_optimization``.
        accumulation_steps: Micro-steps of an optimiser step.
        is_flat: Whether gradients are in flat rows (`train.step.gradients`).
        world_size: Processes.
    """

    stage: int
    model_bytes: int
    matmul_bytes: int
    accumulation_bytes: int
    communication_bytes: int
    options: dict[str, Any]
    accumulation_steps: int
    is_flat: bool
    world_size: int

    @classmethod
    def of(cls, ds_config: dict[str, Any], world_size: int, gradients: GradientsName = "auto") -> "Sharding":
        """Read a configuration as `train.engine.resolve_ds_config` returns it, and `optim.gradients`."""
        precision = precision_of(ds_config)
        model = "bf16" if precision == BF16 else "fp32"
        size = {"bf16": BFLOAT16_BYTES, "fp32": FLOAT32_BYTES}
        options = ds_config.get("zero_optimization", {})
        is_flat = choose_gradients(gradients, ds_config) == "flat"
        accumulation = "fp32" if is_flat else ds_config.get("data_types", {}).get("grad_accum_dtype", model)
        return cls(
            stage=int(options.get("stage", 0)),
            model_bytes=size[model],
            matmul_bytes=FLOAT32_BYTES if precision == FP32 else BFLOAT16_BYTES,
            accumulation_bytes=size[accumulation],
            communication_bytes=size[ds_config["communication_data_type"]],
            options=options,
            accumulation_steps=int(ds_config["gradient_accumulation_steps"]),
            is_flat=is_flat,
            world_size=world_size,
        )

    @property
    def offloads_optimizer(self) -> bool:
        """Whether optimiser states are in host memory."""
        return _offloads(self.options, "offload_optimizer")

    @property
    def offloads_parameters(self) -> bool:
        """Whether the partitioned parameters are in host memory."""
        return _offloads(self.options, "offload_param")

    @property
    def not_modelled(self) -> tuple[str, ...]:
        """Options of the file that the estimate does not know."""
        unknown = sorted(set(self.options) - KNOWN_OPTIONS)
        for name in ("offload_optimizer", "offload_param"):
            if _offloads(self.options, name) and (self.stage < 3 or self.options[name]["device"] != "cpu"):
                unknown.append(f"{name} other than to the CPU at stage 3")
        return tuple(unknown)


def _offloads(options: dict[str, Any], name: str) -> bool:
    return (options.get(name) or {}).get("device", "none") != "none"


def count_parameters(config: Config) -> ParameterCounts:
    """Count the parameters of a configuration's model, built on the meta device.

    If a fine-tuning configuration has no number of classes, as in a recipe, `ASSUMED_CLASSES` are counted.
    """
    model = replace(
        config.model,
        activation_checkpointing=False,
        recompute_attention=True,
        compile_blocks=False,
        attention="sdpa",
    )
    plain = replace(config, batch=BatchConfig(), run=type(config.run)(), model=model, optim=type(config.optim)())
    if isinstance(config, FinetuneConfig):
        assert isinstance(plain, FinetuneConfig)
        optim = replace(plain.optim, layer_decay=config.optim.layer_decay)
        plain = replace(plain, optim=optim, data=replace(config.data, num_classes=num_classes(config)))
    return _count(plain)


def num_classes(config: FinetuneConfig) -> int:
    """Return the number of classes of a fine-tuning, or `ASSUMED_CLASSES` if it is not known yet."""
    return config.data.num_classes or ASSUMED_CLASSES


@lru_cache(maxsize=8)
def _count(config: Config) -> ParameterCounts:
    with torch.device("meta"):
        task = make_task(config)
    groups = [group["params"] for group in task.parameter_groups()]
    return ParameterCounts(
        groups=tuple(tuple(p.numel() for p in group) for group in groups),
        buffers=sum(buffer.numel() for buffer in task.buffers()),
        frozen=tuple(p.numel() for p in task.parameters() if not p.requires_grad),
    )


def persistent_elements(counts: ParameterCounts, sharding: Sharding) -> int:
    """Return the elements of the parameters that stage 3 keeps whole on every process, because they are small."""
    threshold = int(sharding.options.get("stage3_param_persistence_threshold", DEFAULT_PERSISTENCE))
    return sum(count for count in (*counts.trained, *counts.frozen) if count <= threshold)


def bytes_sent(counts: ParameterCounts, sharding: Sharding) -> int:
    """Return the bytes that one GPU sends in one optimiser step, by ring algorithms.

    An all-reduce of X bytes on N GPUs sends 2 (N - 1) / N X, an all-gather or reduce-scatter half of that. Flat
    gradients are all-reduced at stage 0 and reduce-scattered at stages 1 and 2; DeepSpeed's own path all-reduces at
    all three. Stages 0 and 1 do so once a step, stage 2 in every micro-step. Stages 1 and 2 gather the parameters
    after the step. Stage 3 reduce-scatters in every micro-step, and gathers the parameters once in it, or twice if
    they are released between forward and backward. Checkpointing adds no gather. Frozen parameters are not gathered
    for backward or after a step.
    """
    world, steps, total = sharding.world_size, sharding.accumulation_steps, counts.total
    trained = sum(counts.trained)
    gradients, parameters = trained * sharding.communication_bytes, trained * sharding.model_bytes
    if sharding.stage == 0:
        moved = 2 * gradients
    elif sharding.stage < 3:
        reduction = gradients if sharding.is_flat else 2 * gradients
        moved = reduction * (steps if sharding.stage == 2 else 1) + parameters
    else:
        persistent = persistent_elements(counts, sharding) * sharding.model_bytes
        reuse = int(sharding.options.get("stage3_max_reuse_distance", DEFAULT_REUSE))
        gathers = 1 if counts.frozen or 2 * total <= reuse else 2
        moved = steps * (gathers * (total * sharding.model_bytes - persistent) + gradients) + persistent
    return moved * (world - 1) // world
