"""Will it fit: what one GPU holds at the peak of a run, part by part, before the run.

Place in the flow: configuration and resolved DeepSpeed configuration in, `MemoryEstimate` out; `everest plan`
compares many, a run logs its own at the start and holds it against the peak at the end. Arithmetic only: neither
DeepSpeed nor a GPU is needed. What building the engine and saving a checkpoint take for a moment is not counted.
"""

from dataclasses import dataclass
from typing import Any

from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.selection import keep_rule
from everest_ds.model.sizes import get_size
from everest_ds.planning.activations import (
    FLOAT32_BYTES,
    ActivationBytes,
    NumberBytes,
    TokenCounts,
    activation_bytes,
    classifier_activation_bytes,
    ranking_bytes,
)
from everest_ds.planning.sharding import Sharding, bytes_sent, count_parameters, num_classes
from everest_ds.planning.states import model_states
from everest_ds.train.selecting import num_pretrain_noise
from everest_ds.train.tasks import encoder_options

GIB = 2**30
# Assumed, not yet measured: CUDA context, kernels, cuBLAS workspace and NCCL's buffers and channels.
ASSUMED_CONTEXT_BYTES = int(1.5 * GIB)
# Assumed, not yet measured: what the caching allocator reserves beyond what is allocated.
ASSUMED_FRAGMENTATION = 0.05


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one GPU, of the process that holds most.

    Attributes:
        parameters: Parameters as the model computes with them (stage 3: this process's share and the small ones).
        gradients: Gradients, held from backward to the step.
        optimizer: Master weights and both moments of Adam.
        average: This process's share of the weights' moving average.
        gathered: Parameters of other processes during forward and backward (stage 3).
        activations: The most that forward and backward need at once.
        attention: The part of ``activations`` that is attention's own.
        ranking: What ranking all tokens in float32 needs, before any activation is there.
        step: What reducing gradients and stepping need, after the activations are gone.
        input: The micro-batch: uint8 clips, noise, and labels.
        communication: Buffers that gradients are communicated in.
        host: Host memory that offload takes for one GPU, pinned.
        sent: Bytes that one GPU sends in one optimiser step.
        not_modelled: Options of the DeepSpeed configuration that the estimate does not know, and
            model.compile_blocks: compiled code keeps other tensors for backward.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    activations: int
    attention: int
    ranking: int
    step: int
    input: int
    communication: int
    host: int
    sent: int
    not_modelled: tuple[str, ...]

    @property
    def states(self) -> int:
        """Parameters, gradients, optimiser states and moving average."""
        return self.parameters + self.gradients + self.optimizer + self.average

    @property
    def transient(self) -> int:
        """The largest of what follows one another: ranking, forward and backward, the step."""
        return max(self.gathered + max(self.activations, self.ranking), self.step)

    @property
    def allocated(self) -> int:
        """The peak of allocated memory, what ``torch.cuda.max_memory_allocated`` counts."""
        return self.states + self.input + self.communication + self.transient

    @property
    def overhead(self) -> int:
        """Context, NCCL and fragmentation: assumed, not yet measured."""
        return ASSUMED_CONTEXT_BYTES + int(ASSUMED_FRAGMENTATION * self.allocated)

    @property
    def total(self) -> int:
        """What the GPU must have."""
        return self.allocated + self.overhead


def estimate_memory(config: Config, ds_config: dict[str, Any], *, world_size: int) -> MemoryEstimate:
    """Return what one GPU holds at the peak of a run.

    Args:
        config: The run; its micro-batch is the one that is estimated.
        ds_config: As `train.engine.resolve_ds_config` returns it.
        world_size: Processes, one a GPU.
    """
    sharding = Sharding.of(ds_config, world_size)
    counts = count_parameters(config)
    states = model_states(counts, sharding)
    options, clips = encoder_options(config), config.batch.micro_size
    activations = _activations(config, _numbers(sharding))
    return MemoryEstimate(
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        average=_average_bytes(config, sum(counts.trained), world_size),
        gathered=states.gathered,
        activations=activations.peak,
        attention=activations.attention,
        ranking=_ranking_bytes(config, options, clips),
        step=states.step,
        input=clips * _clip_bytes(config),
        communication=states.buckets,
        host=states.host,
        sent=bytes_sent(counts, sharding),
        not_modelled=sharding.not_modelled + (("model.compile_blocks",) if config.model.compile_blocks else ()),
    )


def _numbers(sharding: Sharding) -> NumberBytes:
    """Return bytes of a number; at stage 3 DeepSpeed puts a linear layer of its own in the place of torch's."""
    return NumberBytes(row=sharding.model_bytes, product=sharding.product_bytes, keeps_casts=sharding.stage < 3)


def _activations(config: Config, numbers: NumberBytes) -> ActivationBytes:
    size, options, clips = get_size(config.model.size), encoder_options(config), config.batch.micro_size
    if isinstance(config, FinetuneConfig):
        return classifier_activation_bytes(
            size,
            options,
            clips=clips,
            kept=config.num_kept,
            num_classes=num_classes(config),
            drop_path=config.model.drop_path > 0,
            frozen=config.model.freeze_encoder,
            numbers=numbers,
        )
    assert isinstance(config, PretrainConfig)
    # Where clips differ, the most that a process may get, not the average.
    counts = TokenCounts(clips=clips, visible=config.most.visible, targets=config.most.targets)
    return activation_bytes(size, options, counts, decoder_depth=config.model.decoder_depth, numbers=numbers)


def _ranking_bytes(config: Config, options: EncoderOptions, clips: int) -> int:
    """Return what ranking all tokens takes, those of candidate frames among them; 0 where nothing is ranked."""
    if isinstance(config, FinetuneConfig):
        ranks, grid = keep_rule(config.selection).ranks_to_keep(config.grid), config.grid
    else:
        assert isinstance(config, PretrainConfig)
        ranks, grid = config.selection.measures_change, config.candidate_grid
    if not ranks:
        return 0
    return ranking_bytes(grid, options, width=get_size(config.model.size).width, clips=clips)


def _average_bytes(config: Config, trained: int, world_size: int) -> int:
    averages = isinstance(config, FinetuneConfig) and config.optim.ema_decay is not None
    return -(-trained // world_size) * FLOAT32_BYTES if averages else 0


def _clip_bytes(config: Config) -> int:
    """Return the bytes of one clip as it comes: uint8 pixels, float32 noise, a label or shares of the classes."""
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
    parts = {
        "parameters": estimate.parameters,
        "gradients": estimate.gradients,
        "optimiser": estimate.optimizer,
        "moving average": estimate.average,
        "gathered": estimate.gathered,
        "activations": estimate.activations,
        "ranking": estimate.ranking,
        "step": estimate.step,
        "input": estimate.input,
        "communication": estimate.communication,
    }
    shown = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items() if value)
    line = (
        f"memory estimate a process: {estimate.allocated / GIB:.2f} GiB allocated at the peak, "
        f"{estimate.total / GIB:.2f} with context and fragmentation ({shown})"
    )
    host = f"; {estimate.host / GIB:.2f} GiB of host memory" if estimate.host else ""
    unknown = f"; not counted: {', '.join(estimate.not_modelled)}" if estimate.not_modelled else ""
    return line + host + unknown


def describe_peak(estimate: MemoryEstimate, peak_gib: float) -> str:
    """Return one line for the end of a run on GPUs: the measured peak of allocated memory against the estimate."""
    expected = estimate.allocated / GIB
    return f"peak memory {peak_gib:.2f} GiB allocated, estimated {expected:.2f} ({peak_gib / expected - 1:+.1%})"
