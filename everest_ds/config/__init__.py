"""The configuration of a run: frozen dataclasses that check their fields when they are built.

Every field is a command-line flag (``--optim.base-lr 1e-3``). The package does not import torch, so that a wrong
setting is refused before anything heavy is imported. Learning rate, batch size and the like are set here, sharding
in ds_configs/. `everest_ds.config.file` writes and reads configurations.
"""

from everest_ds.config.base import Config
from everest_ds.config.finetune import (
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneModelConfig,
    FinetuneOptimConfig,
    FinetuneRunConfig,
    SamplingName,
    ViewsConfig,
)
from everest_ds.config.pretrain import PretrainConfig, PretrainDataConfig, PretrainModelConfig
from everest_ds.config.sections import (
    AttentionName,
    BatchConfig,
    DataConfig,
    GradientsName,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SizeName,
    TaskName,
    TrackerName,
)
from everest_ds.config.selection import FinetuneSelectionConfig, SelectionConfig

__all__ = [
    "AttentionName",
    "BatchConfig",
    "Config",
    "DataConfig",
    "FinetuneConfig",
    "FinetuneDataConfig",
    "FinetuneModelConfig",
    "FinetuneOptimConfig",
    "FinetuneRunConfig",
    "FinetuneSelectionConfig",
    "GradientsName",
    "ModelConfig",
    "OptimConfig",
    "PretrainConfig",
    "PretrainDataConfig",
    "PretrainModelConfig",
    "RunConfig",
    "SamplingName",
    "SelectionConfig",
    "SizeName",
    "TaskName",
    "TrackerName",
    "ViewsConfig",
]
