"""Finds the ways of sharding and the micro-batches that fit given GPUs, and recommends one.

Place in the flow: `planning.memory` estimates one setting; this module compares all of them for `everest plan`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from everest_ds.config import Config
from everest_ds.planning.memory import GIB, MemoryEstimate, estimate_memory
from everest_ds.planning.sharding import FLOAT32_BYTES, Sharding
from everest_ds.train.engine import resolve_ds_config
from everest_ds.train.precision import PrecisionName, choose_precision

# More GPUs than this are not suggested.
MAX_SUGGESTED_GPUS = 1024
# model.activation_checkpointing and model.recompute_attention: recompute nothing, all but attention, or all.
RECOMPUTATIONS = ((False, True), (True, False), (True, True))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run: a DeepSpeed configuration, a choice of recomputation, and a micro-batch.

    Attributes:
        name: Name of the DeepSpeed configuration.
        precision: The value of --precision; None if the DeepSpeed configuration implies it.
        config: The run with this micro-batch and recomputation.
        sharding: The sizes that the DeepSpeed configuration decides.
        estimate: The memory that it takes.
    """

    name: str
    precision: str | None
    config: Config
    sharding: Sharding
    estimate: MemoryEstimate

    @property
    def micro_size(self) -> int:
        """Clips of one GPU in one forward pass."""
        return self.config.batch.micro_size

    @property
    def checkpointing(self) -> bool:
        return self.config.model.activation_checkpointing

    @property
    def recomputes_attention(self) -> bool:
        """Whether attention is recomputed too, instead of keeping its output."""
        return self.checkpointing and self.config.model.recompute_attention

    @property
    def needs_same_world(self) -> bool:
        """Whether its checkpoints resume only on the same number of processes (stage 0 in bf16)."""
        return self.sharding.stage == 0 and self.sharding.model_bytes < FLOAT32_BYTES

    @property
    def preference(self) -> tuple[bool | int, ...]:
        """The key by which `recommend` sorts; the smallest is best."""
        sharding, estimate = self.sharding, self.estimate
        return (
            sharding.offloads_optimizer or sharding.offloads_parameters,
            self.checkpointing,
            self.recomputes_attention,
            sharding.accumulation_steps,
            sharding.accumulation_steps > 1 and sharding.accumulation_bytes < FLOAT32_BYTES,
            self.needs_same_world,
            sharding.stage == 3,
            estimate.sent,
            estimate.total,
            -sharding.stage,
        )


@dataclass(frozen=True, kw_only=True)
class SmallestChange:
    """What to change if nothing fits.

    Attributes:
        leanest: The setting that needs least memory on the same number of GPUs.
        more_gpus: The setting that fits on the fewest additional GPUs of the same memory; None if no number helps.
    """

    leanest: Setting
    more_gpus: Setting | None


def plan_settings(
    config: Config,
    systems: Mapping[str, dict[str, Any]],
    *,
    num_gpus: int,
    memory_bytes: int,
    precision: PrecisionName = "auto",
) -> list[Setting]:
    """Return each way of sharding with no, some and full recomputation, at the largest micro-batch that fits.

    If none fits, the setting has a micro-batch of one clip and a total above ``memory_bytes``. Micro-batches divide
    a GPU's share of the global batch, which must be a multiple of the number of GPUs.
    """
    share = config.batch.global_size // num_gpus
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    settings = []
    for name, options in systems.items():
        for checkpointing, recompute_attention in RECOMPUTATIONS:
            for size in sizes:
                sized = _resized(config, size, checkpointing, recompute_attention)
                setting = _make_setting(sized, name, options, num_gpus, precision)
                if setting.estimate.total <= memory_bytes:
                    break
            settings.append(setting)
    return settings


def _resized(config: Config, micro_size: int, checkpointing: bool, recompute_attention: bool = True) -> Config:
    model = replace(config.model, activation_checkpointing=checkpointing, recompute_attention=recompute_attention)
    return replace(config, batch=replace(config.batch, micro_size=micro_size), model=model)


def _make_setting(
    config: Config, name: str, systems: dict[str, Any], num_gpus: int, precision: PrecisionName
) -> Setting:
    """Estimate one setting; ``auto`` is the precision of ``systems`` on GPUs."""
    ds_config = resolve_ds_config(systems, config, world_size=num_gpus, precision=precision, device_type="cuda")
    asked, own = (choose_precision(systems, given, "cuda").name for given in (precision, "auto"))
    sharding = Sharding.of(ds_config, num_gpus, config.optim.gradients)
    if sharding.stage == 3:  # stage 3 does not compile blocks
        config = replace(config, model=replace(config.model, compile_blocks=False))
    return Setting(
        name=name,
        precision=None if asked == own else asked,
        config=config,
        sharding=sharding,
        estimate=estimate_memory(config, ds_config, world_size=num_gpus),
    )


def recommend(settings: list[Setting], memory_bytes: int) -> Setting | None:
    """Return the setting to use, or None if none fits.

    Criteria, the most important first: no offload; least recomputation; fewest accumulation steps; accumulation in
    float32 rather than bf16; checkpoints that resume on any number of processes; a stage below 3, which does not
    gather parameters in every pass; least communication; least memory; the higher stage. Speed is not considered,
    because it has to be measured.
    """
    fitting = [setting for setting in settings if setting.estimate.total <= memory_bytes]
    return min(fitting, key=lambda setting: setting.preference, default=None)


def smallest_change(
    config: Config,
    systems: Mapping[str, dict[str, Any]],
    *,
    num_gpus: int,
    memory_bytes: int,
    precision: PrecisionName = "auto",
) -> SmallestChange:
    """Return what would fit if nothing does: larger GPUs, or more of them."""

    def leanest_on(count: int) -> Setting:
        """Return the setting that needs least memory on that many GPUs, one clip at a time."""
        settings = (
            _make_setting(_resized(config, 1, checkpointing), name, options, count, precision)
            for name, options in systems.items()
            for checkpointing in (False, True)
        )
        return min(settings, key=lambda setting: setting.estimate.total)

    larger = range(num_gpus + 1, min(config.batch.global_size, MAX_SUGGESTED_GPUS) + 1)
    counts = (count for count in larger if config.batch.global_size % count == 0)
    fitting = (leanest_on(count) for count in counts)
    return SmallestChange(
        leanest=leanest_on(num_gpus),
        more_gpus=next((setting for setting in fitting if setting.estimate.total <= memory_bytes), None),
    )


def in_gib(value: int) -> float:
    """Return bytes as GiB, rounded up to a hundredth."""
    return -(-value * 100 // GIB) / 100
