"""The files of a Hugging Face folder besides the weights: config.json, processors, our code, and the model card.

Place in the flow: complete Weights and a recipe -> `make_hub_folder` -> texts that `export` writes. From the block
"everest" of config.json, `modeling_everest` knows which tokens to keep; transformers itself ignores it. The card
names lists without their folders, because it is published.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from everest_ds import __version__
from everest_ds.config import (
    Config,
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneSelectionConfig,
    PretrainConfig,
)
from everest_ds.config.file import config_from_dict
from everest_ds.errors import UserError
from everest_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD
from everest_ds.model.classifier import fixed_draws
from everest_ds.model.selection import SelectionRule, keep_rule
from everest_ds.model.transformer import MLP_RATIO
from everest_ds.model.weights.architecture import Architecture, Kind
from everest_ds.model.weights.foreign import CONFIG
from everest_ds.model.weights.huggingface import FIXED_SETTINGS
from everest_ds.model.weights.reading import Weights
from everest_ds.tokens import TokenGrid, describe_kept

ARCHITECTURES: dict[Kind, str] = {
    "autoencoder": "VideoMAEForPreTraining",
    "classifier": "VideoMAEForVideoClassification",
}
# Our code in a classifier's folder, and its classes.
CODE_FILES = ("modeling_everest.py", "processing_everest.py")
AUTO_MAP = {"AutoModelForVideoClassification": "modeling_everest.VideoMAEForVideoClassification"}
PROCESSING_AUTO_MAP = {"AutoVideoProcessor": "processing_everest.EverestVideoProcessor"}
BILINEAR = 2  # PIL's and transformers' number for it
CARD = "README.md"
LIBRARIES = ("torch", "deepspeed", "transformers", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Clips:
    """The clips of a classifier, and the tokens that it keeps of each.

    Attributes:
        grid: The tokens of a clip.
        data: Which frames and pixels of a video make a clip.
        selection: Which of its tokens are kept.
    """

    grid: TokenGrid
    data: FinetuneDataConfig
    selection: FinetuneSelectionConfig

    @property
    def rule(self) -> SelectionRule:
        return keep_rule(self.selection)

    @property
    def num_kept(self) -> int:
        """How many tokens of a clip the encoder sees."""
        return self.rule.num_kept(self.grid)

    @property
    def keeps_all(self) -> bool:
        return self.num_kept == self.grid.num_tokens

    def describe(self) -> str:
        """Return how many tokens are kept: "keeps 0.6 of the tokens (940 of 1568)"."""
        return describe_kept(self.selection.keep_ratio, self.num_kept, self.grid.num_tokens)

    def fixed_tokens(self) -> list[int] | None:
        """Return the positions that are kept of every clip; None if they depend on the clip or all are kept."""
        rule, grid = self.rule, self.grid
        if self.keeps_all or rule.ranks_to_keep(grid):
            return None
        noise_1S = fixed_draws(rule.keep_noise_length(grid))[None]
        return rule.keep(grid, 1, torch.device("cpu"), noise_1S).position_M.tolist()


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """What a folder contains besides its weights.

    Attributes:
        files: Texts by file name.
        notes: Where transformers computes something different.
    """

    files: dict[str, str]
    notes: tuple[str, ...]


def make_hub_folder(
    weights: Weights, recipe: Config | None, scores: Sequence[str], notes: Sequence[str] = ()
) -> HubFolder:
    """Return the files of the folder of a whole model.

    Args:
        weights: What is exported.
        recipe: How clips are cut and which tokens are kept, for weights that come without a run.
        scores: Recorded scores of the weights, a line each.
        notes: Notes from the translation of names.

    Raises:
        UserError: A recipe is given for weights that have their run's configuration, or the number of heads is
            unknown.
    """
    architecture, run, unreadable = weights.architecture, None, []
    if weights.config is not None:
        try:
            run = config_from_dict(json.loads(weights.config), source="the configuration of their run")
        except (UserError, ValueError) as error:  # of another version of everest_ds
            unreadable.append(f"the run's configuration that came with the weights cannot be used: {error}")
    if run is not None and recipe is not None:
        raise UserError(
            f"--recipe {recipe.recipe} has no effect: {weights.source} has its run's configuration; remove it"
        )
    clips = _find_clips(architecture, run or recipe)
    notes = (*notes, *unreadable, *_note_tokens(architecture, clips))
    files = {CONFIG: _write_config(architecture, clips)} | _write_processors(architecture, clips)
    if clips is not None:
        here = Path(__file__).parent / "hub_code"
        files |= {name: (here / name).read_text(encoding="utf-8") for name in CODE_FILES}
    files[CARD] = _write_card(architecture, clips, _describe_settings(run, recipe), run is not None, scores, notes)
    return HubFolder(files=files, notes=notes)


def _find_clips(architecture: Architecture, config: Config | None) -> Clips | None:
    """Return a classifier's clips according to a configuration; None if unknown."""
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


def _note_tokens(architecture: Architecture, clips: Clips | None) -> list[str]:
    """Return how many tokens the model keeps, and what transformers does instead."""
    if architecture.kind == "autoencoder":
        return ["the selection of tokens is not in the folder: VideoMAEForPreTraining takes bool_masked_pos"]
    if clips is None:
        return [
            "it is not known how many tokens of a clip the weights were trained on; transformers uses all of them. "
            "--recipe NAME adds the recipe's selection to the folder"
        ]
    notes = []
    if clips.keeps_all:
        notes.append(f"the model {clips.describe()} of a clip, as transformers' own VideoMAE does")
    else:
        notes.append(
            f"the model {clips.describe()} of a clip; transformers' own VideoMAE uses all of them, which lowers "
            "its scores. For the same tokens and logits as here, load it with trust_remote_code=True"
        )
    if architecture.grid != clips.grid:
        notes.append(
            "its positions are interpolated from clips of another size; transformers' own VideoMAE computes new "
            "ones, which changes its outputs. trust_remote_code=True interpolates them as here"
        )
    return notes


def _write_config(architecture: Architecture, clips: Clips | None) -> str:
    """Return the config.json; if ``clips`` are known, it names our modelling file.

    Raises:
        UserError: The number of heads is unknown.
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
            "use_mean_pooling": False,  # only then does its encoder have its own norm
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
    return _to_json(config)


def _everest_block(architecture: Architecture, clips: Clips) -> dict[str, Any]:
    """Return settings of our reader and modelling file for which transformers' configuration has no key."""
    selection, grids = clips.selection, (clips.grid, architecture.grid)
    grid, position_grid = ([g.time, g.rows, g.cols] for g in grids)
    return {
        "keep_ratio": selection.keep_ratio,
        "strategy": selection.strategy,
        "order": selection.order,
        "distance": selection.distance,
        "num_kept": clips.num_kept,
        "kept_tokens": clips.fixed_tokens(),
        "grid": grid,
        "position_grid": position_grid,
        "last_norm_eps": architecture.last_norm_eps,
    }


def _write_processors(architecture: Architecture, clips: Clips | None) -> dict[str, str]:
    """Return the settings of transformers' processors, by file name.

    Images: resize the shorter side to the clip's size, crop the centre, standardise with ImageNet's mean and
    deviation. Videos: the same, with our processor for the frames if the clips are known.
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
    images = {"image_processor_type": "VideoMAEImageProcessor", **settings}
    videos = {"video_processor_type": "VideoMAEVideoProcessor", **settings}
    if clips is not None:
        data = clips.data
        videos |= {"num_frames": data.num_frames, "auto_map": PROCESSING_AUTO_MAP, "sampling": data.sampling}
        videos |= {"sampling_stride": data.sampling_stride}
    return {
        "preprocessor_config.json": _to_json(images),
        "video_preprocessor_config.json": _to_json(videos),
    }


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _write_card(
    architecture: Architecture,
    clips: Clips | None,
    settings: str,
    has_run: bool,
    scores: Sequence[str],
    notes: Sequence[str],
) -> str:
    """Return the model card, YAML front matter and Markdown."""
    is_classifier = architecture.kind == "classifier"
    pipeline = "pipeline_tag: video-classification\n" if is_classifier else ""
    title = "Video classifier" if is_classifier else "Masked video autoencoder"
    sections = [
        f"---\nlibrary_name: transformers\n{pipeline}tags:\n- video\n- videomae\n- everest\n---\n",
        f"# {title}{', trained with everest_ds' if has_run else ''}\n",
        f"This is {architecture.describe()}.\n",
        "[EVEREST](https://arxiv.org/abs/2211.10636) (ICML 2024) trains masked video autoencoders on the tokens "
        "that changed most. The weights are float32, in the layout of transformers' VideoMAE.\n",
        "## Settings\n",
        settings,
        "## Scores\n",
        "".join(f"* {line}\n" for line in scores) or "None recorded.\n",
        "## Tokens\n",
        _describe_tokens(architecture, clips),
        "## Loading\n",
        _describe_loading(architecture, clips),
        "## Differences\n",
        "".join(f"* {note}\n" for note in notes),
        "## Versions\n",
        f"{_describe_versions()}\n",
    ]
    return "\n".join(sections)


def _describe_settings(run: Config | None, recipe: Config | None) -> str:
    config = run or recipe
    if config is None:
        return "Not known: the weights came without the configuration of a run.\n"
    said = "The weights came without a run. These are the settings of the recipe named at the export.\n\n"
    lines = [
        "| {} | {} |\n".format(name, str(value).replace("|", "\\|").replace("\n", " "))
        for name, value in _list_settings(config)
    ]
    return f"{'' if run else said}| setting | value |\n|---|---|\n{''.join(lines)}"


def _list_settings(config: Config) -> list[tuple[str, object]]:
    """Return the settings of a run that a reader of the card needs."""
    data, optim = config.data, config.optim
    is_dense = not isinstance(config, FinetuneConfig) or config.data.sampling == "dense"
    frames = f"stride {data.sampling_stride}" if is_dense else "one of each of as many equal parts of the video"
    rows: list[tuple[str, object]] = [
        ("recipe", config.recipe),
        ("clip", f"{data.num_frames} frames ({frames}), {data.image_size} x {data.image_size} pixels"),
        ("training list", _file_name(data.train_list)),
    ]
    if isinstance(config, FinetuneConfig):
        lists = config.data
        rows += [("validation list", _file_name(lists.val_list)), ("test list", _file_name(lists.test_list))]
        rows += [("selection", f"{config.selection.strategy}, keep ratio {config.selection.keep_ratio:g}")]
    if isinstance(config, PretrainConfig):
        selection = config.selection
        ratios = f"selected ratio {selection.selected_ratio:g}, visible ratio {selection.visible_ratio:g}"
        rows.append(("selection", f"{selection.strategy}, {ratios}, budget {selection.budget}"))
    rows += [("epochs", optim.epochs), ("clips a step", config.batch.global_size)]
    return [*rows, ("base learning rate", optim.base_lr)]


def _file_name(path: str | None) -> str:
    return "none" if path is None else Path(path).name


def _describe_tokens(architecture: Architecture, clips: Clips | None) -> str:
    if architecture.kind == "autoencoder":
        return (
            "`VideoMAEForPreTraining` takes the tokens to hide as `bool_masked_pos`. The selection of the run is "
            "not part of this folder: it is code of everest_ds.\n"
        )
    if clips is None:
        return (
            "It is not known how many tokens of a clip these weights were trained on. Transformers uses all of "
            "them. If the model was trained on fewer, its scores are lower in transformers.\n"
        )
    if clips.keeps_all:
        return f"The model {clips.describe()} of a clip, as transformers' VideoMAE does.\n"
    selection = clips.selection
    which = f"the same places in every clip ({selection.strategy})"
    if selection.strategy == "rero":
        most = "most" if selection.order == "descending" else "least"
        distance = f"({selection.distance} distance of their embeddings)"
        which = f"those that changed {most} since the step before {distance}"
    return (
        f"The model was trained and scored on a part of each clip: it {clips.describe()}, {which}. "
        "Transformers' own VideoMAE uses all tokens. This model was not trained for that, so its scores are lower "
        "there. `modeling_everest.py` in this folder selects the same tokens as everest_ds; it runs with "
        "`trust_remote_code=True`.\n"
    )


def _describe_loading(architecture: Architecture, clips: Clips | None) -> str:
    if architecture.kind == "autoencoder":
        name = ARCHITECTURES[architecture.kind]
        code = f"from transformers import {name}\n\nmodel = {name}.from_pretrained(FOLDER)"
        return f"```python\n{code}\n```\n"
    trust = ", trust_remote_code=True" if clips else ""
    code = (
        "from transformers import AutoModelForVideoClassification, pipeline\n\n"
        f'classify = pipeline("video-classification", FOLDER{trust})\n'
        'print(classify("video.mp4"))\n\n'
        f"model = AutoModelForVideoClassification.from_pretrained(FOLDER{trust})\n"
        "logits = model(pixel_values).logits  # (clips, frames, 3, height, width), ImageNet's mean and deviation"
    )
    text = f"```python\n{code}\n```\n"
    if clips is None:
        return f"{text}\n`pipeline` spreads the frames of a clip evenly over the whole video.\n"
    return (
        f"{text}\nWith `trust_remote_code=True`, `pipeline` takes the run's frames and tokens: the middle view "
        "that `everest predict --num-temporal 1 --num-spatial 1` takes. Without it, transformers spreads the "
        "frames evenly over the whole video and uses all tokens. `pipeline` decodes with torchcodec. The scores "
        "above average the softmax of the views that they name; a single view scores a little lower.\n"
    )


def _describe_versions() -> str:
    found = [f"everest_ds {__version__}"]
    for library in LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return f"Exported with {', '.join(found)}."
