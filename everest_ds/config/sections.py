"""Sections that pre-training and fine-tuning share; each checks its fields when it is built."""

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
"""Pixels that are decoded of a video at a time, at most, where nothing else is said: 64 frames of 4K."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which videos, and how a clip is cut from one."""

    train_list: str | None = None
    """List of training videos: one `path label` a line, space or comma, relative to the list or absolute."""
    num_frames: int = 16
    """Frames of a clip."""
    sampling_stride: int = 4
    """Source frames from one clip frame to the next (paper Table 7: sampling stride). A clip of a video at 60
    frames a second then covers half the time of one at 30."""
    sampling_seconds: float | None = None
    """Seconds from one clip frame to the next, by the video's own times, whatever its frame rate; sampling_stride
    is not used then. Stride 4 is 0.16 s at 25 frames a second, 0.1333 s at 30. Without it, frames are counted."""
    image_size: int = 224
    """Height and width of a clip in pixels."""
    flip: bool = True
    """Mirror half of the clips left to right."""
    repeats: int = 1
    """Clips that an epoch draws of each video, from one decoding of it (repeated sampling); they count as clips of
    the global batch."""
    repeat_frames: Literal["shared", "own"] = "shared"
    """shared: the clips of a video differ in crop, flip and augmentation alone; own: each draws its own frames."""
    reader: ReaderName = "auto"
    """Library that reads videos; auto takes the first of PyAV, decord and torchcodec that works here."""
    num_workers: int = 8
    """Loader processes of each training process; 0 decodes in the training process itself."""
    prefetch_batches: int = 2
    """Micro-batches that loader processes make ahead, in shared memory."""
    timeout_s: float = 120.0
    """Seconds until a loader process that hangs on a video is replaced, and the video counts as unreadable. Has no
    effect without loader processes."""
    keep_decoded: bool = False
    """Keep the decoded frames of every video in memory, in each loader process: for small datasets."""
    max_pixels: int = MAX_PIXELS
    """Pixels (frames x height x width) that are decoded of a video at a time, at most, and 16 times those of one
    frame. A video that takes more counts as unreadable, before its memory is taken; three bytes a pixel."""
    quarantine: str | None = None
    """List of videos to leave out of training and of scoring on the way, as `everest check-data` writes one."""
    max_bad_share: float = 0.01
    """Unreadable draws as a share of the list (or of all draws so far, if more) above which the run stops."""

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
    """Encoder and decoder widths, depth and heads (everest_ds/model/sizes.py)."""
    patch_size: int = 16
    """Height and width of a tubelet in pixels."""
    tubelet_size: int = 2
    """Frames of a tubelet."""
    embedding_layers: Literal[1, 2, 3] = 1
    """Conv3d layers of the tubelet embedding (paper Table 15)."""
    attention: AttentionName = "auto"
    """Attention backend (everest_ds/model/attention.py); auto is sdpa where all clips keep equally many tokens, and
    the first of varlen, flash and sdpa that is available where they do not."""
    activation_checkpointing: bool = False
    """Recompute each block in backward instead of storing its activations."""
    recompute_attention: bool = True
    """With activation_checkpointing: recompute attention too; false keeps its output, one more tensor of the size
    of a block's input."""
    compile_blocks: bool = False
    """Compile each block's layers around attention with torch.compile, for any number of tokens. Alone it
    was slower at 32 clips and 6 % quicker at 128 (ViT-L, H200). Not with ZeRO-3; needs a compiler."""
    cuda_graph: CudaGraphName = "auto"
    """Capture forward and backward pass of a micro-batch as one CUDA graph and replay it: auto where that is
    possible, off never; on refuses to start where it is not possible."""
    position_frames: int | None = None
    """Frames of the clips that positions are laid out for (those of --init-from), when not this run's."""
    position_size: int | None = None
    """Height and width of those clips; this run's clips get their positions interpolated."""

    def __post_init__(self) -> None:
        require_counts("model", self, "patch_size", "tubelet_size", "position_frames", "position_size")
        if not (self.activation_checkpointing or self.recompute_attention):
            raise UserError(
                "model.recompute_attention=False has no effect with model.activation_checkpointing=False: nothing "
                "is recomputed then; set that to true, or leave this out"
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
    """Peak learning rate for 256 clips a step; the peak is base_lr * global_batch_size / 256."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine, for 256 clips a step (the official default)."""
    warmup_lr: float = 0.0
    """Learning rate of step 0, for 256 clips a step (the official code always starts at 0)."""
    warmup_epochs: float = 40
    """Epochs of linear warm-up."""
    epochs: int = 200
    """Epochs of the schedule and of the run."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; biases, norms and the mask token have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's momentum terms."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 0.0
    """Clip the global gradient norm at this; 0 clips nothing (the paper does not clip)."""
    gradients: GradientsName = "auto"
    """flat: gradients lie in one row per parameter group, and a step does no work by parameter; deepspeed: the
    path of DeepSpeed itself; auto: flat at ZeRO-0, 1 and 2 without offloading, else deepspeed."""

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
    """Clips of one forward and backward pass of a process; accumulation steps are computed from the two sizes."""

    def __post_init__(self) -> None:
        require_counts("batch", self, "global_size", "micro_size")

    def accumulation_steps(self, world_size: int) -> int:
        """Return the micro-steps of one optimiser step on ``world_size`` processes.

        Raises:
            UserError: micro_size x world_size does not divide global_size; names the nearest that do.
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
        """Return the largest micro-batch that divides a process's share and is no larger than the one given."""
        return max(size for size in range(1, min(share, self.micro_size) + 1) if share % size == 0)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the run writes, and when it ends."""

    seed: int = 0
    """Seed of weights, order, augmentation and selection."""
    max_steps: int | None = None
    """Stop after this many optimiser steps; the schedule stays that of optim.epochs."""
    log_every_steps: int = 20
    """Steps from one line of metrics to the next."""
    save_every_epochs: int = 20
    """Epochs from one checkpoint to the next; the last step always saves."""
    save_every_steps: int | None = None
    """Also save at every multiple of this many steps."""
    save_async: bool = True
    """Write checkpoints by a process of each rank while the training continues; takes host memory for copies."""
    keep_checkpoints: int = 3
    """Complete checkpoints to keep, the newest ones."""
    keep_every_epochs: int | None = None
    """Also keep for good the checkpoints of every multiple of this many epochs."""
    max_skipped_steps: int = 0
    """Steps that a run may skip because of a non-finite gradient; one more stops the run."""
    pictures_every_steps: int = 1000
    """Steps from one picture of what is kept of a few clips to the next, in RUN/media; also at the first line of
    metrics and after the last step. More where drawing would take above 1 % of the time; 0 draws none."""
    hang_after_s: float = 60.0
    """Seconds without progress, or five median steps if that is longer, after which the run counts as hanging:
    every rank writes its stacks, the one that is behind is named, and the run ends with exit code 62; the same
    command resumes it. data.timeout_s comes on top where there are loader processes. The first steps, saving and
    scoring may take ten times as long. 0 watches nothing."""
    check_weights_every: int = 100
    """Steps from one comparison of the weights over the ranks to the next, by a checksum of every step; also before
    each checkpoint. A difference, which only broken hardware makes, ends the run. 0 compares nothing."""
    log_to: tuple[TrackerName, ...] = ("tensorboard",)
    """Where the run is shown besides metrics.jsonl; all but tensorboard are packages to install. A resumed run is
    continued there. Without a name after the flag, nowhere."""
    profile: bool = False
    """Write a trace of three early steps of rank zero into RUN/profile, by torch's profiler."""

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
    """Refuse fields of a section that are set and below 1."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= 1, f"{section}.{name}", value, "at least 1")


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Refuse the value of a field by its name."""
    if not condition:
        raise UserError(f"{name}={value} must be {expected}")
