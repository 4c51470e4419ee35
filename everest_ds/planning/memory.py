"""Estimates the peak memory of one GPU, part by part, before a run.

Place in the flow: configuration and resolved DeepSpeed configuration in, `MemoryEstimate` out. `everest plan`
compares many estimates. A run prints its own at the start, and compares it with the measured peak at the end. It is
arithmetic only: neither DeepSpeed nor a GPU is needed. Memory for building the engine is not counted.
"""

from dataclasses import asdict, dataclass
from typing import Any

from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.model.selection import keep_rule
from everest_ds.model.sizes import get_size
from everest_ds.planning.activations import NumberBytes, activation_bytes, ranking_bytes
from everest_ds.planning.sharding import (
    FLOAT32_BYTES,
    ParameterCounts,
    Sharding,
    bytes_sent,
    count_parameters,
    num_classes,
)
from everest_ds.planning.states import ADAM_BYTES, MASTER_BYTES, ModelStates, model_states
from everest_ds.train.checkpoints.save import share_of_rank
from everest_ds.train.selecting import num_pretrain_noise
from everest_ds.train.step.graph import capture_obstacle

GIB = 2**30
# Assumed, not yet measured: CUDA context, kernels, cuBLAS workspace and NCCL's buffers and channels.
ASSUMED_CONTEXT_BYTES = int(1.5 * GIB)
# Assumed, not yet measured: share that the caching allocator reserves beyond the allocated memory.
ASSUMED_FRAGMENTATION = 0.05


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate(ModelStates):
    """Bytes on one GPU, for the process that needs most: model states and everything else.

    Attributes:
        average: This process's share of the weights' moving average.
        activations: The most that forward and backward need at once.
        attention: The part of ``activations`` for attention.
        ranking: Memory for ranking all tokens in float32, before any activation is alive.
        input: The micro-batch: uint8 clips, noise, and labels.
        pool: Memory that a captured CUDA graph keeps between steps: that of forward and backward, and a copy of the
            input; 0 without a graph.
        copies: Host memory for copies of a checkpoint's contents, on rank zero, which writes most.
        sent: Bytes that one GPU sends in one optimiser step.
        not_modelled: Options that the estimate does not know: some of the DeepSpeed configuration, and
            model.compile_blocks, because compiled code keeps other tensors for backward.
    """

    average: int
    activations: int
    attention: int
    ranking: int
    input: int
    pool: int
    copies: int
    sent: int
    not_modelled: tuple[str, ...]

    @property
    def states(self) -> int:
        """Parameters, gradients, optimiser states and moving average."""
        return self.parameters + self.gradients + self.optimizer + self.average

    @property
    def host_memory(self) -> int:
        """Host memory of one GPU's process: for offload, and for copies of checkpoints."""
        return self.host + self.copies

    @property
    def transient(self) -> int:
        """The largest of consecutive phases: ranking, forward and backward, filling the flat rows, the step.

        A graph's pool cannot be used for anything else, so the step comes on top of it.
        """
        if self.pool:
            return self.pool + self.step
        return max(self.gathered + max(self.activations, self.ranking), self.collected, self.step)

    @property
    def allocated(self) -> int:
        """The peak of allocated memory as ``torch.cuda.max_memory_allocated`` counts it, and a graph's pool."""
        return self.states + self.input + self.communication + self.transient

    @property
    def overhead(self) -> int:
        """CUDA context, NCCL and fragmentation: assumed, not yet measured."""
        return ASSUMED_CONTEXT_BYTES + int(ASSUMED_FRAGMENTATION * self.allocated)

    @property
    def total(self) -> int:
        """Memory that the GPU must have."""
        return self.allocated + self.overhead


def estimate_memory(
    config: Config, ds_config: dict[str, Any], *, world_size: int, device_type: str = "cuda"
) -> MemoryEstimate:
    """Estimate the memory of one GPU at the peak of a run.

    Args:
        config: The run, with the micro-batch to estimate.
        ds_config: As `train.engine.resolve_ds_config` returns it.
        world_size: Processes, one a GPU.
        device_type: cuda or cpu; on a CPU no graph is captured.
    """
    sharding = Sharding.of(ds_config, world_size, config.optim.gradients)
    counts = count_parameters(config)
    activations = activation_bytes(config, NumberBytes.of(sharding))
    states, input_bytes = model_states(counts, sharding), config.batch.micro_size * _clip_bytes(config)
    is_captured = config.model.cuda_graph != "off" and capture_obstacle(config, ds_config, device_type) is None
    passes = states.gathered + max(activations.peak, ranking_bytes(config), states.collected)
    return MemoryEstimate(
        **asdict(states),
        average=_average_bytes(config, sum(counts.trained), world_size),
        activations=activations.peak,
        attention=activations.attention,
        ranking=ranking_bytes(config),
        input=input_bytes,
        pool=passes + input_bytes if is_captured else 0,
        copies=_copy_bytes(config, counts, sharding) if config.run.save_async else 0,
        sent=bytes_sent(counts, sharding),
        not_modelled=sharding.not_modelled + (("model.compile_blocks",) if config.model.compile_blocks else ()),
    )


def _average_bytes(config: Config, trained: int, world_size: int) -> int:
    averages = isinstance(config, FinetuneConfig) and config.optim.ema_decay is not None
    return -(-trained // world_size) * FLOAT32_BYTES if averages else 0


def _copy_bytes(config: Config, counts: ParameterCounts, sharding: Sharding) -> int:
    """Return the bytes that rank zero writes of a checkpoint: shards, and the whole moving average."""
    weights, trained = counts.total * sharding.model_bytes, sum(counts.trained)
    total = weights + trained * (MASTER_BYTES + ADAM_BYTES)
    shards = share_of_rank(total, weights, sharding.stage, world_size=sharding.world_size, is_main=True)
    return shards + _average_bytes(config, trained, 1)


def _clip_bytes(config: Config) -> int:
    """Return the bytes of one input clip: uint8 pixels, float32 noise, and a label or class probabilities."""
    pixels_of_frame = 3 * config.data.image_size**2
    if isinstance(config, FinetuneConfig):
        pixels = config.data.num_frames * pixels_of_frame
        noise = 2 * get_size(config.model.size).depth if config.model.drop_path else 0
        noise += keep_rule(config.selection).keep_noise_length(config.grid)
        target = num_classes(config) * FLOAT32_BYTES if config.data.mixes else 8
        return pixels + noise * FLOAT32_BYTES + target
    assert isinstance(config, PretrainConfig)
    frames = config.candidate_frames
    if frames > config.data.num_frames:
        frames += config.data.num_frames  # the chosen ones are copied
    return frames * pixels_of_frame + num_pretrain_noise(config) * FLOAT32_BYTES


def describe_estimate(estimate: MemoryEstimate) -> str:
    """Return one line for the start of a run: the peak and its parts in GiB."""
    names = (
        "parameters", "gradients", "optimizer", "average", "gathered", "activations", "ranking", "pool", "step",
        "input", "communication",
    )  # fmt: skip
    spelled = {"optimizer": "optimiser", "average": "moving average"}
    parts = {spelled.get(name, name): getattr(estimate, name) / GIB for name in names}
    shown = ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if value)
    line = (
        f"memory estimate a process: {estimate.allocated / GIB:.2f} GiB allocated at the peak, "
        f"{estimate.total / GIB:.2f} with context and fragmentation ({shown})"
    )
    copies = f", {estimate.copies / GIB:.2f} of them for copies of checkpoints" if estimate.copies else ""
    host = f"; {estimate.host_memory / GIB:.2f} GiB of host memory{copies}" if estimate.host_memory else ""
    unknown = f"; not counted: {', '.join(estimate.not_modelled)}" if estimate.not_modelled else ""
    return line + host + unknown


def describe_peak(estimate: MemoryEstimate, peak_gib: float) -> str:
    """Return one line for the end of a run on GPUs: the measured peak of allocated memory against the estimate."""
    expected = estimate.allocated / GIB
    return f"peak memory {peak_gib:.2f} GiB allocated, estimated {expected:.2f} ({peak_gib / expected - 1:+.1%})"
