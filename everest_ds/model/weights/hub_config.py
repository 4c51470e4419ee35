"""The settings of a Hugging Face folder: config.json and those of processors, and what of a run goes into them.

Place in the flow: Architecture and the run's configuration -> `Clips` -> texts for `export`. The block "everest" of
config.json is what `modeling_everest` chooses tokens by; transformers itself does not look at it.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from everest_ds.config import Config, FinetuneConfig, FinetuneDataConfig, FinetuneSelectionConfig
from everest_ds.model.classifier import fixed_draws
from everest_ds.model.selection import SelectionRule, keep_rule
from everest_ds.model.transformer import MLP_RATIO
from everest_ds.model.tubelets import IMAGENET_MEAN, IMAGENET_STD
from everest_ds.model.weights.architecture import Architecture, Kind
from everest_ds.model.weights.huggingface import FIXED_SETTINGS
from everest_ds.tokens import TokenGrid, describe_kept

ARCHITECTURES: dict[Kind, str] = {
    "autoencoder": "VideoMAEForPreTraining",
    "classifier": "VideoMAEForVideoClassification",
}
# The module of ours that a classifier's folder carries, and its class.
MODELING_FILE = "modeling_everest.py"
AUTO_MAP = {"AutoModelForVideoClassification": "modeling_everest.VideoMAEForVideoClassification"}
PROCESSING_FILE = "processing_everest.py"
PROCESSING_AUTO_MAP = {"AutoVideoProcessor": "processing_everest.EverestVideoProcessor"}
BILINEAR = 2  # PIL's and transformers' number of it


@dataclass(frozen=True, kw_only=True)
class Clips:
    """The clips that a classifier is used on, and the tokens that it keeps of each.

    Attributes:
        grid: The tokens of a clip.
        data: Which frames and pixels of a video it is made of.
        selection: What is kept of its tokens.
    """

    grid: TokenGrid
    data: FinetuneDataConfig
    selection: FinetuneSelectionConfig

    @property
    def rule(self) -> SelectionRule:
        """What the tokens are chosen by."""
        return keep_rule(self.selection)

    @property
    def num_kept(self) -> int:
        """Tokens of a clip that go through the encoder."""
        return self.rule.num_kept(self.grid)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is left out."""
        return self.num_kept == self.grid.num_tokens

    def describe(self) -> str:
        """Return how many tokens are kept, in words: "keeps 0.6 of the tokens (940 of 1568)"."""
        return describe_kept(self.selection.keep_ratio, self.num_kept, self.grid.num_tokens)

    def fixed_tokens(self) -> list[int] | None:
        """Return the positions that are kept of every clip; None where they depend on the clip, or all are kept."""
        rule, grid = self.rule, self.grid
        if self.keeps_all or rule.ranks_to_keep(grid):
            return None
        noise_1S = fixed_draws(rule.keep_noise_length(grid))[None]
        kept = rule.keep(grid, 1, torch.device("cpu"), noise_1S)
        return [int(position) for position in kept.position_M]


def clips_of(architecture: Architecture, config: Config | None) -> Clips | None:
    """Return what a classifier is used on, by the configuration of its run; None where there is none."""
    if not isinstance(config, FinetuneConfig) or architecture.kind != "classifier":
        return None
    options, data = architecture.options, config.data
    grid = TokenGrid.of_clip(
        num_frames=data.num_frames,
        height=data.image_size,
        width=data.image_size,
        tubelet_size=options.tubelet_size,
        patch_size=options.patch_size,
    )
    return Clips(grid=grid, data=data, selection=config.selection)


def config_for(architecture: Architecture, clips: Clips | None) -> str:
    """Return the config.json of a model that `from_pretrained` builds.

    Args:
        architecture: The model.
        clips: What a classifier is used on, where that is known: the configuration then names our modelling file.

    Raises:
        UserError: The number of heads cannot be told.
    """
    size, options = architecture.size(), architecture.options
    grid = architecture.grid if clips is None else clips.grid
    height, width = grid.rows * options.patch_size, grid.cols * options.patch_size
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture.kind]],
        **FIXED_SETTINGS,
        "hidden_size": size.width,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": MLP_RATIO * size.width,
        "image_size": height if height == width else [height, width],
        "num_frames": grid.time * options.tubelet_size,
        "tubelet_size": options.tubelet_size,
        "patch_size": options.patch_size,
        "layer_norm_eps": architecture.norm_eps,
        "qv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }
    if architecture.kind == "autoencoder":
        config |= {
            "decoder_hidden_size": size.decoder_width,
            "decoder_num_hidden_layers": architecture.decoder_depth,
            "decoder_num_attention_heads": size.decoder_num_heads,
            "decoder_intermediate_size": MLP_RATIO * size.decoder_width,
            "use_mean_pooling": False,  # its encoder has a norm of its own only then
            "norm_pix_loss": True,
        }
    else:
        labels = architecture.labels or [f"LABEL_{i}" for i in range(architecture.num_classes or 0)]
        config |= {
            "use_mean_pooling": True,
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    if clips is not None:
        config |= {"auto_map": AUTO_MAP, "everest": _everest_block(architecture, clips)}
    return json.dumps(config, indent=2) + "\n"


def _everest_block(architecture: Architecture, clips: Clips) -> dict[str, Any]:
    """Return what our reader and our modelling file need and transformers' configuration has no place for."""
    selection = clips.selection
    return {
        "keep_ratio": selection.keep_ratio,
        "strategy": selection.strategy,
        "order": selection.order,
        "distance": selection.distance,
        "num_kept": clips.num_kept,
        "kept_tokens": clips.fixed_tokens(),
        "grid": _edges(clips.grid),
        "position_grid": _edges(architecture.grid),
        "last_norm_eps": architecture.last_norm_eps,
    }


def preprocessors_for(architecture: Architecture, clips: Clips | None) -> dict[str, str]:
    """Return the settings of transformers' processors, by file name.

    Images: shorter side to the clip's size, the middle cut out, ImageNet's mean and deviation. Videos: the same,
    and our processor for the frames where it is known which ones a clip is made of.
    """
    patch = architecture.options.patch_size
    grid = architecture.grid if clips is None else clips.grid
    height, width = grid.rows * patch, grid.cols * patch
    settings: dict[str, Any] = {
        "do_resize": True,
        "size": {"shortest_edge": height} if height == width else {"height": height, "width": width},
        "resample": BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
    of_images = {"image_processor_type": "VideoMAEImageProcessor", **settings}
    of_videos = {"video_processor_type": "VideoMAEVideoProcessor", **settings}
    if clips is not None:
        data = clips.data
        of_videos |= {"num_frames": data.num_frames, "auto_map": PROCESSING_AUTO_MAP, "sampling": data.sampling}
        of_videos |= {"sampling_stride": data.sampling_stride}
    files = {"preprocessor_config.json": of_images, "video_preprocessor_config.json": of_videos}
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


def _edges(grid: TokenGrid) -> list[int]:
    return [grid.time, grid.rows, grid.cols]


def with_positions_of(architecture: Architecture, config: Config | None) -> Architecture:
    """Return the architecture with the positions that a configuration lays out, where the weights do not say."""
    if architecture.grid_is_known or config is None:
        return architecture
    return replace(architecture, grid=config.position_grid, grid_is_known=True)
