"""Sections of the configuration that both tasks share; each checks its fields when it is built."""

import math
from dataclasses import dataclass
from typing import Literal

from everest_ds.errors import UserError

AttentionName = Literal["auto", "sdpa", "varlen", "flash", "fa3", "fa4"]
CudaGraphName = Literal["auto", "on", "off"]
GradientsName = Literal["auto", "flat", "deepspeed"]
TaskName = Literal["pretrain", "finetune"]
ReaderName = Literal["auto", "decord", "pyav", "torchcodec"]
SizeName = Literal["nano", "thin", "tiny", "small", "base", "large", "huge"]
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
MAX_PIXELS = 2**29
"""Default limit on the pixels of a video that are decoded at a time: 64 frames of 4K."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which videos are read, and how clips are cut."""

    train_list: str | None = None
    """List of training videos: one `path label` a line, separated by a space, tab or comma; paths are absolute or
    relative to the list's folder."""
    num_frames: int = 16
    """Frames of a clip."""
    sampling_stride: int = 4
    """Video frames from one clip frame to the next (paper Table 7). At 60 frames a second, a clip covers half the
    time of one at 30."""
    sampling_seconds: float | None = None
    """Seconds from one clip frame to the next, by the times of the video's frames, for any frame rate; replaces
    sampling_stride. Stride 4 is 0.16 s at 25 frames a second and 0.1333 s at 30."""
    image_size: int = 224
    """Height and width of a clip in pixels."""
    flip: bool = True
    """Mirror half of the clips left to right."""
    repeats: int = 1
    """Repeated sampling: clips cut from each video in an epoch, decoded once; all count in the global batch."""
    repeat_frames: Literal["shared", "own"] = "shared"
    """shared: the clips of a video differ only in crop, flip and augmentation; own: each draws its own frames."""
    reader: ReaderName = "auto"
    """Library that reads videos; auto takes the first of PyAV, decord and torchcodec that works on this machine."""
    num_workers: int = 8
    """Loader workers of each training process; 0 reads videos in the training process itself."""
    prefetch_batches: int = 2
    """Micro-batches that loader workers make ahead, in shared memory."""
    timeout_s: float = 120.0
    """Seconds after which a loader worker that hangs on a video is replaced, and the video counts as unreadable. No
    effect with num_workers 0."""
    keep_decoded: bool = False
    """Keep the decoded frames of all videos in the memory of each loader worker; for small datasets."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels (frames x height x width) of a video that are decoded at a time; a frame may have a
    sixteenth of it. A larger video counts as unreadable. A pixel takes three bytes of memory."""
    quarantine: str | None = None
    """List of videos to leave out of training and validation, as written by `everest check-data`."""
    max_bad_share: float = 0.01
    """Largest share of unreadable draws, relative to the list or to all draws so far if those are more; above it,
    the run stops."""

    def __post_init__(self) -> None:
        require_counts(
            "data", self, "num_frames", "sampling_stride", "image_size", "repeats", "prefetch_batches", "max_pixels"
        )
        seconds = self.sampling_seconds
        seconds_ok = seconds is None or (math.isfinite(seconds) and seconds > 0)
        require(seconds_ok, "data.sampling_seconds", seconds, "above 0")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "at least 0")
        require(self.timeout_s > 0, "data.timeout_s", self.timeout_s, "above 0")
        require(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "a share in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder-decoder."""

    size: SizeName = "base"
    """Widths, depth and heads of encoder and decoder (everest_ds/model/sizes.py)."""
    patch_size: int = 16
    """Height and width of a tubelet in pixels."""
    tubelet_size: int = 2
    """Frames of a tubelet."""
    embedding_layers: Literal[1, 2, 3] = 1
    """Conv3d layers of the tubelet embedding (paper Table 15)."""
    attention: AttentionName = "auto"
    """Attention backend (everest_ds/model/attention.py). auto: sdpa if all clips keep the same number of tokens,
    otherwise the first of varlen, flash and sdpa that is available."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""
    recompute_attention: bool = True
    """With activation_checkpointing: recompute attention too; false keeps its output, one more tensor of the size
    of a block's input."""
    compile_blocks: bool = False
    """Compile each block's layers around attention with torch.compile, for any number of tokens. On its own it was
    slower at 32 clips and 6 % faster at 128 (ViT-L, H200). Not available with ZeRO-3; needs a compiler."""
    cuda_graph: CudaGraphName = "auto"
    """Capture the forward and backward pass of a micro-batch as one CUDA graph and replay it. auto: if possible;
    on: refuse to start if it is not possible; off: never."""
    position_frames: int | None = None
    """Frames of the clips that the position embeddings are for (those of --init-from), if they differ from
    num_frames."""
    position_size: int | None = None
    """Height and width of those clips; positions are interpolated to this run's clips."""

    def __post_init__(self) -> None:
        require_counts("model", self, "patch_size", "tubelet_size", "position_frames", "position_size")
        if not (self.activation_checkpointing or self.recompute_attention):
            raise UserError(
                "model.recompute_attention=False has no effect with model.activation_checkpointing=False; remove "
                "it, or set model.activation_checkpointing=True"
            )
        shrunk = {1: 1, 2: 4, 3: 8}.get(self.embedding_layers)
        require(shrunk is not None, "model.embedding_layers", self.embedding_layers, "1, 2 or 3")
        if self.patch_size % (shrunk or 1):
            raise UserError(
                f"model.patch_size={self.patch_size} must be a multiple of {shrunk} for "
                f"model.embedding_layers={self.embedding_layers}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, warm-up and cosine decay."""

    base_lr: float = 1.5e-4
    """Peak learning rate for 256 clips a step; it is scaled by batch.global_size / 256."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine, for 256 clips a step (the official default)."""
    warmup_lr: float = 0.0
    """Learning rate of step 0, for 256 clips a step (the official code always starts at 0)."""
    warmup_epochs: float = 40
    """Epochs of linear warm-up."""
    epochs: int = 200
    """Epochs of the schedule and of the run."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; biases, norms and the mask token are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's momentum terms."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 0.0
    """Clip the global gradient norm at this value; 0 turns clipping off (the paper does not clip)."""
    gradients: GradientsName = "auto"
    """flat: gradients of a parameter group are in one flat buffer, and a step has no work for single parameters;
    deepspeed: DeepSpeed's own path; auto: flat with ZeRO-0, 1 and 2 without offloading, otherwise deepspeed."""

    def __post_init__(self) -> None:
        for name in ("base_lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "max_grad_norm"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "at least 0")
        require(self.eps > 0, "optim.eps", self.eps, "above 0")
        require_counts("optim", self, "epochs")
        betas_ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(betas_ok, "optim.betas", self.betas, "two numbers in [0, 1)")
        if self.warmup_epochs > self.epochs:
            raise UserError(
                f"optim.warmup_epochs={self.warmup_epochs} is above optim.epochs={self.epochs}; shorten the warm-up"
            )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sizes of the global batch and of a micro-batch."""

    global_size: int = 1024
    """Clips of one optimiser step over all processes."""
    micro_size: int = 32
    """Clips of one forward and backward pass of a process. Accumulation steps are computed from both sizes."""

    def __post_init__(self) -> None:
        require_counts("batch", self, "global_size", "micro_size")

    def accumulation_steps(self, world_size: int) -> int:
        """Return the micro-steps of one optimiser step on ``world_size`` processes.

        Raises:
            UserError: micro_size x world_size does not divide global_size; the message names the nearest sizes.
        """
        steps, rest = divmod(self.global_size, self.micro_size * world_size)
        if steps and not rest:
            return steps
        below = max(self.global_size // world_size, 1) * world_size
        sizes = [self.global_size] if below == self.global_size else [below, below + world_size]
        options = [f"{size} with batch.micro_size={self._fitting_micro(size // world_size)}" for size in sizes]
        raise UserError(
            f"batch.micro_size={self.micro_size} x {world_size} processes does not divide "
            f"batch.global_size={self.global_size}; use batch.global_size={' or '.join(options)}"
        )

    def _fitting_micro(self, share: int) -> int:
        """Return the largest size up to ``micro_size`` that divides a process's share of the global batch."""
        return max(size for size in range(1, min(share, self.micro_size) + 1) if share % size == 0)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the run writes, and when it ends."""

    seed: int = 0
    """Seed of weights, order, augmentation and selection."""
    max_steps: int | None = None
    """Stop after this many optimiser steps; the schedule is still that of optim.epochs."""
    log_every_steps: int = 20
    """Steps between lines of metrics."""
    save_every_epochs: int = 20
    """Epochs between checkpoints; the last step is always saved."""
    save_every_steps: int | None = None
    """Also save at every multiple of this many steps."""
    save_async: bool = True
    """Write checkpoints in a process of each rank while training continues; takes host memory for copies."""
    keep_checkpoints: int = 3
    """Number of complete checkpoints to keep; older ones are removed."""
    keep_every_epochs: int | None = None
    """Never remove the checkpoints of every multiple of this many epochs."""
    max_skipped_steps: int = 0
    """Steps that a run may skip because of a non-finite gradient; one more stops the run."""
    pictures_every_steps: int = 1000
    """Steps between pictures of the kept tokens of a few clips, in RUN/media; also drawn at the first line of
    metrics and after the last step. Drawn less often if it would take over 1 % of the time; 0 draws none."""
    hang_after_s: float = 60.0
    """Seconds without progress (or five median steps, if longer) after which the run counts as hanging: every rank
    writes its stacks, the rank that is behind is named, and the run ends with exit code 62; the same command
    resumes it. With loader workers, data.timeout_s is added. The first steps, saving and validation may take ten
    times as long. 0 turns the watchdog off."""
    check_weights_every: int = 100
    """Steps between comparisons of the weights across ranks, by checksums of every step; also before each
    checkpoint. A difference, which only broken hardware causes, ends the run. 0 turns the comparison off."""
    log_to: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers that show the run besides metrics.jsonl; all but tensorboard need an extra package. A resumed run is
    continued there. The flag without a name turns all off."""
    profile: bool = False
    """Write a torch profiler trace of three early steps of rank zero into RUN/profile."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "run.seed", self.seed, "in [0, 2**63)")
        steps = ("max_steps", "log_every_steps", "save_every_steps")
        require_counts("run", self, *steps, "save_every_epochs", "keep_checkpoints", "keep_every_epochs")
        every = self.check_weights_every
        require(every >= 0, "run.check_weights_every", every, "at least 0")
        hang_ok = math.isfinite(self.hang_after_s) and self.hang_after_s >= 0
        pictures = self.pictures_every_steps
        require(pictures >= 0, "run.pictures_every_steps", pictures, "at least 0 (0 draws none)")
        require(hang_ok, "run.hang_after_s", self.hang_after_s, "at least 0")
        require(len(set(self.log_to)) == len(self.log_to), "run.log_to", self.log_to, "names, each once")
        require(self.max_skipped_steps >= 0, "run.max_skipped_steps", self.max_skipped_steps, "at least 0")


def require_counts(section: str, config: object, *names: str) -> None:
    """Raise UserError for a field of a section that is below 1; None is allowed."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= 1, f"{section}.{name}", value, "at least 1")


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise UserError, naming the field and the expected value, if the condition is false."""
    if not condition:
        raise UserError(f"{name}={value} must be {expected}")
