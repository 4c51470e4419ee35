"""A loaded model with its clip settings and its selection rule; `everest_ds.load` returns one.

Place in the flow: Origin, or a configuration alone -> LoadedModel -> VideoClip -> PicturedClip -> a picture.
Axes: C T H W of a clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from everest_ds.config import (
    Config,
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneModelConfig,
    FinetuneSelectionConfig,
    PretrainConfig,
    PretrainDataConfig,
    PretrainModelConfig,
    ViewsConfig,
)
from everest_ds.config.file import config_from_dict
from everest_ds.config.sections import ReaderName
from everest_ds.data.clips.views import read_views, view_frames
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.data.readers.video import Video
from everest_ds.errors import UserError
from everest_ds.files import parse_json
from everest_ds.inference.source import ClipSettings, InferenceOptions, WeightsName, clip_settings
from everest_ds.inference.trained import load_autoencoder, load_trained, read_trained
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.encoder import EncoderOptions, TokenEncoder
from everest_ds.model.selection import SelectionRule, keep_rule
from everest_ds.model.sizes import get_size
from everest_ds.model.weights.architecture import require_size
from everest_ds.model.weights.reading import Weights
from everest_ds.pictures.clip import PicturedClip
from everest_ds.pictures.clip_sheet import draw_clip
from everest_ds.pictures.examine import choose_frames, examine
from everest_ds.tokens import TokenGrid
from everest_ds.train.checkpoints.origin import Origin
from everest_ds.train.selecting import pretrain_rule
from everest_ds.train.tasks import encoder_options

MIDDLE = ViewsConfig(num_temporal=1, num_spatial=1)
UNLABELLED = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoClip:
    """The clip in the middle of a video, or of a window of it.

    Attributes:
        row: The video.
        clip_CTHW: uint8, cropped in the middle.
        numbers_T: Number of each frame in the video or its window.
        times_s: Time of each frame, in seconds from the video's first frame.
        num_frames: Number of frames of the video or its window.
        end_s: Time of the last frame of the video or its window.
    """

    row: VideoRow
    clip_CTHW: Tensor
    numbers_T: NDArray[np.int64]
    times_s: NDArray[np.float64]
    num_frames: int
    end_s: float

    def describe(self) -> str:
        """Return a text that says which frames of the video these are."""
        first, last = self.numbers_T[0], self.numbers_T[-1]
        num, edge = self.clip_CTHW.shape[1], self.clip_CTHW.shape[2]
        repeats = num - len(np.unique(self.numbers_T))
        short = f"; the video is too short: {repeats} of them are repeated" if repeats else ""
        return (
            f"{num} frames of {edge} x {edge} pixels, cropped in the middle: numbers {first} to {last} of "
            f"{self.num_frames}, {self.times_s[0]:.2f} to {self.times_s[-1]:.2f} s of {self.end_s:.2f} s{short}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A model in evaluation mode, with the settings of its clips and tokens.

    Attributes:
        model: `EverestAutoencoder` of pre-training, `EverestClassifier`, or, without weights, the embedding alone.
        settings: How clips are made from videos.
        rule: Which tokens of a clip are kept.
        report: A text about what was loaded.
        predicts: Whether some kept tokens are visible and others predicted; otherwise all are visible.
        is_fresh: Whether there are no weights.
        candidate_steps: Number of time steps from which a clip's steps are selected; 0 without frame selection.
        class_names: Names of the classes, for a classifier with a head.
    """

    model: EverestAutoencoder | TokenEncoder
    settings: ClipSettings
    rule: SelectionRule
    report: str
    predicts: bool = False
    is_fresh: bool = False
    candidate_steps: int = 0
    class_names: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @property
    def options(self) -> EncoderOptions:
        """The encoder's options, its tubelets among them."""
        return self.model.encoder.options if isinstance(self.model, EverestAutoencoder) else self.model.options

    @property
    def grid(self) -> TokenGrid:
        """The tokens of a clip that goes through the model."""
        data, options = self.settings.data, self.options
        return TokenGrid.of_clip(
            num_frames=data.num_frames,
            height=data.image_size,
            width=data.image_size,
            tubelet_size=options.tubelet_size,
            patch_size=options.patch_size,
        )

    def read(self, video: VideoRow | Path | str, *, num_frames: int | None = None) -> VideoClip:
        """Read the clip in the middle of a video.

        Args:
            video: A file, or a row of a list for a window.
            num_frames: Frames of the clip. Default: those of the settings.

        Raises:
            VideoReadError: The video cannot be read.
        """
        row = video if isinstance(video, VideoRow) else VideoRow(Path(video), UNLABELLED)
        data = self.data(num_frames)
        opened = Video.of_row(row, data.reader, data.max_pixels)
        return self.clip_of(row, read_views(opened, data, MIDDLE)[0], opened)

    def clip_of(self, row: VideoRow, clip_CTHW: Tensor, video: Video | None = None) -> VideoClip:
        """Return a clip that was already read, the middle view of its row, with frame numbers and times."""
        data = self.data(clip_CTHW.shape[1])
        video = video or Video.of_row(row, data.reader, data.max_pixels)
        numbers, start_s = np.array(view_frames(video, data, 1)[0]), row.start_s or 0.0
        times_s = video.times_s()
        return VideoClip(
            row=row,
            clip_CTHW=clip_CTHW,
            numbers_T=numbers,
            times_s=start_s + times_s[numbers],
            num_frames=video.num_frames,
            end_s=start_s + float(times_s[-1]),
        )

    def data(self, num_frames: int | None = None) -> FinetuneDataConfig:
        """Return the settings of clips, with another number of frames if one is given."""
        steps = self.candidate_steps * self.options.tubelet_size
        return replace(self.settings.data, num_frames=num_frames or steps or self.settings.data.num_frames)

    def examine(self, clip: VideoClip, rules: Sequence[tuple[str, SelectionRule]] | None = None) -> PicturedClip:
        """Return which tokens the model keeps of a clip, and what it reconstructs, as arrays.

        Args:
            clip: The clip; with all candidate frames if the configuration selects frames.
            rules: Selection rules to compare, each with a label. Default: the model's own.
        """
        pixels, numbers, times_s = clip.clip_CTHW.to(self.device), clip.numbers_T, clip.times_s
        if self.candidate_steps:
            pixels, choice = choose_frames(self.model, pixels, self.rule, self.grid.time)
            tubelet = self.options.tubelet_size
            place = (choice.steps_BT[0].cpu().numpy()[:, None] * tubelet + np.arange(tubelet)).flatten()
            numbers, times_s = numbers[place], times_s[place]
        rules = rules or [(self.describe_rule(self.rule), self.rule)]
        return examine(
            self.model,
            pixels,
            rules,
            predicts=self.predicts,
            reconstructs=self.predicts and len(rules) == 1,
            times_s=times_s,
            numbers=numbers,
        )

    def describe_rule(self, rule: SelectionRule) -> str:
        """Return a text that says which tokens a rule keeps."""
        order = ", least changing first" if rule.order == "ascending" else ""
        distance = f", by {rule.distance}" if rule.strategy == "rero" and rule.distance != "l2" else ""
        return f"{rule.strategy} {rule.selected_ratio:g}{order}{distance}"

    def draw(self, video: VideoRow | Path | str) -> Image.Image:
        """Return a picture of the clip in the middle of a video: its kept tokens, and their reconstruction.

        Raises:
            VideoReadError: The video cannot be read.
        """
        clip = self.read(video)
        return draw_clip(self.examine(clip), title=clip.row.path.name, lines=self.captions(clip))

    def captions(self, clip: VideoClip) -> list[str]:
        """Return the caption of a clip's picture: its frames and the weights."""
        chosen = f"; {self.grid.time} of their {self.candidate_steps} time steps are selected by change"
        return [f"{clip.describe()}{chosen if self.candidate_steps else ''}", self.report.split("\n")[0]]


def load_model(
    origin: Origin, recipe: Config | None = None, *, weights: WeightsName = "auto", reader: ReaderName | None = None
) -> LoadedModel:
    """Load the model of a run, a checkpoint, or weights in any layout, on the CPU.

    If neither the weights nor a recipe has settings for clips, clips have the length and size of the weights'
    positions and a stride of 4 frames; the report says so.

    Args:
        origin: From `locate`.
        recipe: The configuration, for weights without one.
        weights: Which weights of a checkpoint.
        reader: Library that reads videos, instead of data.reader.

    Raises:
        UserError: Weights are damaged, of an unknown layout, or do not fit the recipe.
    """
    read = read_trained(origin, weights)
    config, note = _config_of(origin, recipe, read[1])
    options = InferenceOptions(num_temporal=1, num_spatial=1, weights=weights, reader=reader, precision="fp32")
    settings = clip_settings(origin, None if config is origin.config else config, options)
    settings = replace(settings, attention="auto")  # the backend of training may need a GPU
    device = torch.device("cpu")
    class_names: tuple[str, ...] = ()
    model: EverestAutoencoder | TokenEncoder
    is_autoencoder = read[1].architecture.kind == "autoencoder"
    if is_autoencoder:
        model, report = load_autoencoder(read[1], settings)
    else:
        trained = load_trained(origin, settings, options, device, read)
        model, report, class_names = trained.model, trained.report, trained.class_names
    predicts = isinstance(config, PretrainConfig) and is_autoencoder
    return LoadedModel(
        model=model,
        settings=settings,
        rule=_rule_of(config, settings, predicts=predicts),
        predicts=predicts,
        candidate_steps=_candidates_of(config) if predicts else 0,
        class_names=class_names,
        report=report + note,
    )


def fresh_model(config: Config, *, reader: ReaderName | None = None) -> LoadedModel:
    """Return the embedding that a run with this configuration starts from. It ranks tokens but predicts nothing."""
    options = InferenceOptions(num_temporal=1, num_spatial=1, reader=reader)
    origin = Origin(given=Path(config.recipe), weights=Path(config.recipe))
    settings = clip_settings(origin, config, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        size = replace(get_size(config.model.size), depth=0)
        model = TokenEncoder(size, config.position_grid, encoder_options(config))
    predicts = isinstance(config, PretrainConfig)
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        settings=settings,
        rule=_rule_of(config, settings, predicts=predicts),
        predicts=predicts,
        is_fresh=True,
        candidate_steps=_candidates_of(config),
        report=f"recipe {config.recipe}, ViT-{config.model.size}: no weights were given, so tokens are ranked "
        f"as in the first step of training, by a fresh embedding of seed {config.run.seed}",
    )


def _rule_of(config: Config, settings: ClipSettings, *, predicts: bool) -> SelectionRule:
    if predicts and isinstance(config, PretrainConfig):
        return pretrain_rule(config)
    return keep_rule(settings.selection)


def _candidates_of(config: Config) -> int:
    if not isinstance(config, PretrainConfig) or config.selection.alpha == 1:
        return 0
    return require_size(config.candidate_grid, f"selection.alpha={config.selection.alpha:g}").time


def _config_of(origin: Origin, recipe: Config | None, weights: Weights) -> tuple[Config, str]:
    """Return the configuration for clips, and a note if it was made from the weights' shapes."""
    if recipe is not None:
        return recipe, ""
    if origin.config is not None:
        return origin.config, ""
    if weights.config is not None:
        return config_from_dict(_parsed(weights), source=f"the configuration in {weights.source}"), ""
    shape = weights.architecture
    tubelet, patch, grid = shape.options.tubelet_size, shape.options.patch_size, shape.grid
    if grid.rows != grid.cols:
        raise UserError(
            f"{weights.source} has no settings for clips of {grid.cols * patch} x {grid.rows * patch} pixels; "
            "give --recipe"
        )
    frames, edge = grid.time * tubelet, grid.rows * patch
    note = (
        f"\n  note          the weights have no settings for clips; used are {frames} frames of {edge} pixels at "
        "stride 4 (change with --recipe)"
    )
    if shape.kind == "autoencoder":
        data = PretrainDataConfig(num_frames=frames, image_size=edge)
        model = PretrainModelConfig(tubelet_size=tubelet, patch_size=patch)
        return PretrainConfig(recipe="weights", data=data, model=model), note
    keep = FinetuneSelectionConfig()
    if weights.keep_ratio is not None:
        keep = replace(keep, keep_ratio=weights.keep_ratio)
    return FinetuneConfig(
        recipe="weights",
        data=FinetuneDataConfig(num_frames=frames, image_size=edge),
        model=FinetuneModelConfig(tubelet_size=tubelet, patch_size=patch),
        selection=keep,
    ), note


def _parsed(weights: Weights) -> object:
    try:
        return parse_json(weights.config)
    except (ValueError, TypeError) as error:
        raise UserError(f"the configuration in {weights.source} is not JSON ({error}); give --recipe") from error
