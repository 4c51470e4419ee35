"""Tasks: what turns a batch into a loss. The loop and the engine know nothing else of the model.

Place in the flow: ClipBatch on the device -> task -> loss. Axes: B clips, C T H W of a clip, S selected
tokens of a clip.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from everest_ds.config import Config, PretrainConfig
from everest_ds.data.cuts import PretrainCut
from everest_ds.data.dataset import ClipBatch, ClipDataset
from everest_ds.data.index import VideoRow
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.flops import autoencoder_macs
from everest_ds.model.sizes import get_size
from everest_ds.train.optim import parameter_groups


@dataclass(frozen=True, kw_only=True)
class ClipCost:
    """What one clip costs.

    Attributes:
        tokens: Tokens that go through the encoder.
        train_flops: Operations of a forward and a backward pass, two for a multiply-accumulate, recomputation of
            checkpointed blocks not counted.
    """

    tokens: int
    train_flops: float


class Task(nn.Module, ABC):
    """What is trained: a model and how a batch becomes its loss.

    DeepSpeed wraps this module, so its parameters carry the prefix ``model.`` in checkpoints.
    """

    model: EverestAutoencoder
    config: Config

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, object]]:
        """Return the optimiser's groups."""

    @abstractmethod
    def inputs(self, batch: ClipBatch, device: torch.device) -> tuple[Tensor, ...]:
        """Move what `forward` takes to the device, as bytes."""

    @abstractmethod
    def make_dataset(self, rows: Sequence[VideoRow]) -> ClipDataset:
        """Return the training clips."""

    @abstractmethod
    def clip_cost(self) -> ClipCost:
        """Return what one clip costs."""


class PretrainTask(Task):
    """Masked reconstruction."""

    config: PretrainConfig

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config
        self.keep_visible_as_target = config.selection.targets == "selected"
        self.model = build_autoencoder(config)

    def forward(self, clips_BCTHW: Tensor, noise_BS: Tensor) -> Tensor:
        """Return the loss of a micro-batch."""
        output = self.model(
            clips_BCTHW,
            noise_BS,
            num_visible=self.config.num_visible,
            keep_visible_as_target=self.keep_visible_as_target,
        )
        return output.loss

    def parameter_groups(self) -> list[dict[str, object]]:
        """Return the optimiser's groups: parameters with and without weight decay."""
        return parameter_groups(self, self.config.optim.weight_decay)

    def inputs(self, batch: ClipBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Move what `forward` takes to the device, as bytes."""
        return (
            batch.clips_BCTHW.to(device, non_blocking=True),
            batch.noise_BS.to(device, non_blocking=True),
        )

    def make_dataset(self, rows: Sequence[VideoRow]) -> ClipDataset:
        """Return the training clips, each with its selection noise."""
        config = self.config
        return ClipDataset(rows, PretrainCut(config.data), seed=config.run.seed, noise_length=config.num_selected)

    def clip_cost(self) -> ClipCost:
        """Return what one clip of the recipe costs; counted with SDPA, the one backend that needs no device."""
        config = replace(self.config, model=replace(self.config.model, attention="sdpa"))
        with torch.device("meta"):
            model = build_autoencoder(config)
        counts = autoencoder_macs(
            model, config.grid, num_visible=config.num_visible, num_targets=config.num_targets
        )
        with_gradient = counts.embedding_chosen + counts.rest
        return ClipCost(tokens=config.num_visible, train_flops=2 * (counts.embedding_all + 3 * with_gradient))


def make_task(config: Config) -> Task:
    """Return the task that a configuration is of, its model freshly initialised from torch's global generator."""
    assert isinstance(config, PretrainConfig)
    return PretrainTask(config)


def build_autoencoder(config: PretrainConfig) -> EverestAutoencoder:
    """Return the autoencoder that a configuration describes, freshly initialised from torch's global generator."""
    return EverestAutoencoder(
        get_size(config.model.size),
        config.position_grid,
        encoder_options(config),
        decoder_depth=config.model.decoder_depth,
    )


def encoder_options(config: Config) -> EncoderOptions:
    """Return what a configuration says of the model besides its size."""
    return EncoderOptions(
        tubelet_size=config.model.tubelet_size,
        patch_size=config.model.patch_size,
        embedding_layers=config.model.embedding_layers,
        attention=config.model.attention,
        activation_checkpointing=config.model.activation_checkpointing,
    )
