"""Tasks turn a batch into a loss. The loop and the engine use the model only through its task.

Place in the flow: ClipBatch on the device -> task -> loss. Axes: B clips, C T H W of a clip, S selected
tokens of a clip.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.data.clips.augment import PairMixer
from everest_ds.data.clips.batch import ClipBatch
from everest_ds.data.clips.cuts import FinetuneCut, PretrainCut
from everest_ds.data.clips.dataset import ClipDataset
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.flops import autoencoder_macs, classifier_macs
from everest_ds.model.frames import FrameChoice
from everest_ds.model.selection import keep_rule
from everest_ds.model.sizes import get_size
from everest_ds.train.selecting import Budget, num_pretrain_noise, pretrain_rule, share_of_loss
from everest_ds.train.step.optim import parameter_groups


class Task(nn.Module, ABC):
    """A model together with its loss.

    DeepSpeed wraps this module, so its parameters carry the prefix ``model.`` in checkpoints.
    """

    model: EverestAutoencoder | EverestClassifier
    config: Config
    visible_tokens: int = 0
    """Tokens that this rank's last forward pass encoded."""
    frame_choice: FrameChoice | None = None
    """The frames that the last forward pass chose; None if it chose none."""
    threshold: float | None = None
    """The running quantile of importance, for checkpoints; None if the budget has none."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's groups, without frozen parameters."""

    @abstractmethod
    def inputs(self, batch: ClipBatch, device: torch.device) -> tuple[Tensor, ...]:
        """Move the inputs of `forward` to the device; pixels stay uint8."""

    @abstractmethod
    def make_dataset(self, rows: Sequence[VideoRow]) -> ClipDataset:
        """Return the dataset of training clips, each with the noise that `forward` needs."""

    @abstractmethod
    def clip_flops(self) -> float:
        """Return the operations of an average clip, forward and backward, two for each multiply-accumulate.

        Recomputation is not counted. Attention is counted as SDPA, which needs no GPU.
        """


class PretrainTask(Task):
    """Masked reconstruction."""

    model: EverestAutoencoder
    config: PretrainConfig

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config
        self.rule = pretrain_rule(config)
        self.budget = Budget(config) if config.selection.varies else None
        self.model = build_autoencoder(config)

    def forward(self, clips_BCTHW: Tensor, noise_BS: Tensor) -> Tensor:
        """Return the loss of a micro-batch.

        If clips keep different numbers of tokens, it is weighted so that the mean over ranks is the mean over
        tokens.
        """
        output = self.model(clips_BCTHW, noise_BS, self.rule, self.budget)
        self.visible_tokens = output.selection.visible.packing.total
        self.frame_choice = output.frames[0] if output.frames else None
        if self.budget is None:
            return output.loss
        return output.loss * share_of_loss(output.selection.target.packing.total, output.loss.device)

    @property
    def threshold(self) -> float | None:
        value = None if self.budget is None else self.budget.threshold
        return None if value is None else float(value)

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        if value is not None and self.budget is not None:
            self.budget.threshold = torch.tensor(value)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self, self.config.optim.weight_decay)

    def inputs(self, batch: ClipBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        clips_BCTHW = batch.clips_on(device, self.config.data.image_size)
        return clips_BCTHW, batch.noise_BS.to(device, non_blocking=True)

    def make_dataset(self, rows: Sequence[VideoRow]) -> ClipDataset:
        config = self.config
        cut = PretrainCut(replace(config.data, num_frames=config.candidate_frames))
        return ClipDataset(rows, cut, seed=config.run.seed, noise_length=num_pretrain_noise(config))

    def clip_flops(self) -> float:
        """Return the operations of an average clip."""
        config = replace(self.config, model=replace(self.config.model, attention="sdpa", compile_blocks=False))
        with torch.device("meta"):
            model = build_autoencoder(config)
        macs = autoencoder_macs(
            model,
            config.grid,
            num_visible=config.num_visible,
            num_targets=config.num_targets,
            ranked=config.candidate_grid if config.selection.measures_change else None,
        )
        return 2 * (macs.ranking + 3 * (macs.embedding_chosen + macs.rest))


class FinetuneTask(Task):
    """Classification by label."""

    model: EverestClassifier
    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__()
        self.config = config
        self.model = build_classifier(config)
        if config.model.freeze_encoder:
            self.model.freeze_encoder()

    def forward(self, clips_BCTHW: Tensor, target: Tensor | None = None, noise_BL: Tensor | None = None) -> Tensor:
        """Return the loss of a micro-batch, or without a target its logits (B, K) in float32.

        Args:
            clips_BCTHW: uint8.
            target: Labels (B,), int64, or class probabilities (B, K).
            noise_BL: Uniform noise for drop path, in [0, 1).
        """
        self.visible_tokens = len(clips_BCTHW) * self.config.num_kept
        logits_BK = self.model(clips_BCTHW, noise_BL).float()
        if target is None:
            return logits_BK
        return F.cross_entropy(logits_BK, target, label_smoothing=self.config.optim.label_smoothing)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self, self.config.optim.weight_decay, self.config.optim.layer_decay)

    def inputs(self, batch: ClipBatch, device: torch.device) -> tuple[Tensor, ...]:
        target = batch.label_B if batch.target_BK is None else batch.target_BK
        return tuple(part.to(device, non_blocking=True) for part in (batch.clips_BCTHW, target, batch.noise_BS))

    def make_dataset(self, rows: Sequence[VideoRow]) -> ClipDataset:
        config, seed = self.config, self.config.run.seed
        mixer = PairMixer.of(config.data, seed=seed, num_classes=self.model.num_classes)
        num_noise = self.model.num_noise(config.grid)
        return ClipDataset(rows, FinetuneCut(config.data), seed=seed, noise_length=num_noise, mixer=mixer)

    def clip_flops(self) -> float:
        """Return the operations of one clip; a frozen encoder counts only forward."""
        config = replace(self.config, model=replace(self.config.model, attention="sdpa", compile_blocks=False))
        with torch.device("meta"):
            model = build_classifier(config).eval()  # so that drop path needs no noise
        counts = classifier_macs(model, config.grid)
        passes = 1 if config.model.freeze_encoder else 3
        return 2 * (counts.ranking + passes * (counts.embedding_chosen + counts.rest))


def make_task(config: Config) -> Task:
    """Return the task of a configuration; its model is initialised from torch's global generator."""
    if isinstance(config, FinetuneConfig):
        return FinetuneTask(config)
    assert isinstance(config, PretrainConfig)
    return PretrainTask(config)


def build_classifier(config: FinetuneConfig) -> EverestClassifier:
    """Return the classifier of a configuration with a number of classes, initialised as in `make_task`."""
    if config.data.num_classes is None:
        raise ValueError("data.num_classes is not resolved; it comes from the training list")
    return EverestClassifier(
        get_size(config.model.size),
        config.position_grid,
        encoder_options(config),
        num_classes=config.data.num_classes,
        rule=keep_rule(config.selection),
        head_init_scale=config.model.head_init_scale,
        drop_path=config.model.drop_path,
    )


def build_autoencoder(config: PretrainConfig) -> EverestAutoencoder:
    """Return the autoencoder of a configuration, initialised as in `make_task`."""
    return EverestAutoencoder(
        get_size(config.model.size),
        config.position_grid,
        encoder_options(config),
        decoder_depth=config.model.decoder_depth,
    )


def encoder_options(config: Config) -> EncoderOptions:
    """Return a configuration's settings of the model besides its size."""
    return EncoderOptions(
        tubelet_size=config.model.tubelet_size,
        patch_size=config.model.patch_size,
        embedding_layers=config.model.embedding_layers,
        attention=config.model.attention,
        activation_checkpointing=config.model.activation_checkpointing,
        recompute_attention=config.model.recompute_attention,
        compile_blocks=config.model.compile_blocks,
    )
