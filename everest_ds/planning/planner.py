"""Which way of sharding, and how large a micro-batch, fits some GPUs.

Place in the flow: `everest plan` asks; `planning.memory` answers for one setting, this module for all of them.
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
# model.activation_checkpointing and model.recompute_attention: nothing, all but attention, and all is recomputed.
RECOMPUTATIONS = ((False, True), (True, False), (True, True))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run: a DeepSpeed configuration, recomputation or not, a micro-batch.

    Attributes:
        name: Of the DeepSpeed configuration.
        precision: What --precision must say; None where the DeepSpeed configuration means the same by itself.
        config: The run with this micro-batch and recomputation.
        sharding: What the DeepSpeed configuration decides.
        estimate: What it takes.
    """

    name: str
    precision: str | None
    config: Config
    sharding: Sharding
    estimate: MemoryEstimate

    @property
    def micro_size(self) -> int:
        """Clips that a GPU takes through the model at once."""
        return self.config.batch.micro_size

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are recomputed in backward."""
        return self.config.model.activation_checkpointing

    @property
    def recomputes_attention(self) -> bool:
        """Whether attention is recomputed too, as it is unless its output is kept."""
        return self.checkpointing and self.config.model.recompute_attention

    @property
    def needs_same_world(self) -> bool:
        """Whether its checkpoints resume in a world of the same size only (stage 0 in bf16)."""
        return self.sharding.stage == 0 and self.sharding.model_bytes < FLOAT32_BYTES

    @property
    def preference(self) -> tuple[bool | int, ...]:
        """What `recommend` sorts by, best first."""
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
    """What would have to change where nothing fits.

    Attributes:
        leanest: The setting that needs least memory on the same number of GPUs.
        more_gpus: What fits on the smallest larger number of GPUs of the same memory, if any number helps.
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

    Where none fits, the setting is that of one clip; its total says so. Micro-batches are those that divide a GPU's
    share of the global batch, which must be a multiple of the GPUs.
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
    """Estimate one setting; ``auto`` is the precision that the systems say for GPUs."""
    ds_config = resolve_ds_config(systems, config, world_size=num_gpus, precision=precision, device_type="cuda")
    asked, own = (choose_precision(systems, given, "cuda").name for given in (precision, "auto"))
    sharding = Sharding.of(ds_config, num_gpus, config.optim.gradients)
    if sharding.stage == 3:  # where blocks cannot be compiled
        config = replace(config, model=replace(config.model, compile_blocks=False))
    return Setting(
        name=name,
        precision=None if asked == own else asked,
        config=config,
        sharding=sharding,
        estimate=estimate_memory(config, ds_config, world_size=num_gpus),
    )


def recommend(settings: list[Setting], memory_bytes: int) -> Setting | None:
    """Return the setting to use, or None when none fits.

    The rule: no offload before offload; no recomputation before that of all but attention, and that before all of
    it; then the fewest accumulation steps, accumulation in float32 before bf16, checkpoints that resume in any
    world before those that do not, stages that do not gather parameters in every pass before stage 3, the least
    communication, the least memory, the higher stage. Speed is not considered: it has to be measured.
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
    """Return what would fit where nothing does: larger GPUs, or more of them."""

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
