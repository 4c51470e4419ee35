"""The configuration of a fine-tuning run (paper Table 8) and of the evaluation of its classifier."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from everest_ds.config.base import Config
from everest_ds.config.sections import DataConfig, ModelConfig, OptimConfig, RunConfig, require, require_counts
from everest_ds.config.selection import FinetuneSelectionConfig
from everest_ds.errors import UserError
from everest_ds.tokens import count_kept

SamplingName = Literal["dense", "segment"]


@dataclass(frozen=True, kw_only=True)
class FinetuneDataConfig(DataConfig):
    """Which videos are read, and how clips are cut and augmented."""

    val_list: str | None = None
    """List of videos for validation during training; without it, nothing is scored."""
    test_list: str | None = None
    """List of videos that `everest evaluate` scores."""
    class_names: str | None = None
    """File with one class name a line; without it, classes.txt beside the training list if there is one."""
    num_classes: int | None = None
    """Number of classes; without it, the number of class names, else the largest training label plus 1."""
    sampling: SamplingName = "dense"
    """dense: frames at a stride, or sampling_seconds apart, from one random start; segment: one random frame from
    each of num_frames equal parts."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop as a share of the frame: smallest and largest."""
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)
    """Width of a random crop over its height: smallest and largest."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation; the official code has rand-m7-n4-mstd0.5-inc1."""
    erase_prob: float = 0.0
    """Probability that a box of random size is erased in all frames of a clip (the official code has 0.25)."""
    mixup_alpha: float = 0.0
    """Parameter of mixup's beta distribution; 0 turns mixup off (the official code has 0.8)."""
    cutmix_alpha: float = 0.0
    """Parameter of CutMix's beta distribution; 0 turns CutMix off (the official code has 1.0). If mixup is on too,
    each pair draws one of them at even odds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_classes is None or self.num_classes >= 2, "data.num_classes", self.num_classes, "at least 2"
        )
        low, high = self.crop_area
        require(0 < low <= high <= 1, "data.crop_area", self.crop_area, "two shares in (0, 1], the smaller first")
        low, high = self.crop_aspect
        require(0 < low <= high, "data.crop_aspect", self.crop_aspect, "two ratios above 0, the smaller first")
        require(0 <= self.erase_prob <= 1, "data.erase_prob", self.erase_prob, "a share in [0, 1]")
        for name in ("mixup_alpha", "cutmix_alpha"):
            require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "at least 0")
        if self.sampling == "segment" and self.sampling_seconds is not None:
            raise UserError(
                f"data.sampling_seconds={self.sampling_seconds} has no effect with data.sampling=segment, which "
                "takes frames from the whole video; use data.sampling=dense, or remove data.sampling_seconds"
            )

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed in pairs."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


@dataclass(frozen=True, kw_only=True)
class FinetuneModelConfig(ModelConfig):
    """The encoder and its head."""

    drop_path: float = 0.1
    """Stochastic depth: share of clips that skip a branch of the last block, linearly less to 0 in the first."""
    head_init_scale: float = 0.001
    """Factor on the head's initial weights (official `init_scale`)."""
    freeze_encoder: bool = False
    """Train only the last norm and the head (linear probe)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "a share in [0, 1)")
        require(self.head_init_scale >= 0, "model.head_init_scale", self.head_init_scale, "at least 0")
        if self.freeze_encoder and self.drop_path:
            raise UserError(
                f"model.freeze_encoder with model.drop_path={self.drop_path}: a frozen encoder drops no branches; "
                "set model.drop_path=0"
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    """AdamW with layer decay, warm-up and cosine decay."""

    base_lr: float = 1e-3
    """Peak learning rate of the head for 256 clips a step; it is scaled by batch.global_size / 256."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine, for 256 clips a step (the official default)."""
    warmup_epochs: float = 5
    """Epochs of linear warm-up."""
    epochs: int = 50
    """Epochs of the schedule and of the run."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's momentum terms."""
    layer_decay: float = 0.75
    """Learning rate of a layer over that of the next layer; 1 gives all layers the same."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    ema_decay: float | None = None
    """Also keep an exponential moving average of the weights with this decay per step; validation scores it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "in (0, 1]")
        require(0 <= self.label_smoothing < 1, "optim.label_smoothing", self.label_smoothing, "a share in [0, 1)")
        decay_ok = self.ema_decay is None or 0 < self.ema_decay < 1
        require(decay_ok, "optim.ema_decay", self.ema_decay, "in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class FinetuneRunConfig(RunConfig):
    """What the run writes, when it is validated, and when it ends."""

    save_every_epochs: int = 5
    """Epochs between checkpoints; the last step is always saved."""
    validate_every_epochs: int = 1
    """Epochs between validations on data.val_list; the last step is always scored. The best one is also saved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts("run", self, "validate_every_epochs")


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """The views of a test video, num_temporal x num_spatial; their softmax outputs are averaged."""

    num_temporal: int = 5
    """Clips spread evenly over the video; a single one is in the middle."""
    num_spatial: int = 3
    """Crops spread evenly over the longer side; a single one is in the middle."""

    def __post_init__(self) -> None:
        require_counts("views", self, "num_temporal", "num_spatial")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Config):
    """Complete configuration of one fine-tuning run: the content of RUN/config.json."""

    task: Annotated[Literal["finetune"], tyro.conf.Suppress] = "finetune"
    """Task of the run."""
    data: FinetuneDataConfig = field(default_factory=FinetuneDataConfig)
    model: FinetuneModelConfig = field(default_factory=FinetuneModelConfig)
    selection: FinetuneSelectionConfig = field(default_factory=FinetuneSelectionConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    run: FinetuneRunConfig = field(default_factory=FinetuneRunConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_kept < self.grid.num_tokens and self.selection.measures_change:
            self._require_two_steps()
        if self.num_kept < 1:
            raise UserError(
                f"selection.keep_ratio={self.selection.keep_ratio} of {self.grid.num_tokens} tokens keeps none; "
                f"use at least {1 / self.grid.num_tokens:.4g}"
            )
        if self.data.mixes and self.batch.micro_size % 2:
            raise UserError(
                f"batch.micro_size={self.batch.micro_size} must be even: data.mixup_alpha and data.cutmix_alpha "
                "mix clips in pairs"
            )

    @property
    def num_kept(self) -> int:
        """Tokens of a clip that the encoder sees."""
        return count_kept(self.selection.strategy, self.grid, self.selection.keep_ratio)

    @property
    def tokens(self) -> str:
        """Token counts of a clip, in words."""
        return f"{super().tokens}, {self.num_kept} kept"
