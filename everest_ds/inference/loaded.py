"""A model of any origin, how clips are cut for it, and which tokens it keeps: what `everest_ds.load` returns.

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
        numbers_T: The frame of the video, or of its window, that each frame is.
        times_s: When each frame is shown, in seconds from the video's first frame.
        num_frames: Frames of the video or its window.
        end_s: When the last of these is shown.
    """

    row: VideoRow
    clip_CTHW: Tensor
    numbers_T: NDArray[np.int64]
    times_s: NDArray[np.float64]
    num_frames: int
    end_s: float

    def describe(self) -> str:
        """Return which frames of the video these are, for people."""
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
    """A model in evaluation mode, and how it looks at videos.

    Attributes:
        model: `EverestAutoencoder` of pre-training, `EverestClassifier`, or, without weights, the bare embedding.
        settings: How clips are cut.
        rule: Which tokens are kept of a clip.
        report: What was loaded, for people.
        predicts: Whether some of these are visible and others predicted; else all are visible.
        is_fresh: Whether there are no weights.
        candidate_steps: Time steps that a clip's are chosen from; 0 where none are chosen.
        class_names: Of a classifier with a head.
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
        """Where the model is."""
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
            num_frames: Frames of the clip, where not those of the settings.

        Raises:
            VideoReadError: The video cannot be read.
        """
        row = video if isinstance(video, VideoRow) else VideoRow(Path(video), UNLABELLED)
        data = self.data(num_frames)
        opened = Video.of_row(row, data.reader, data.max_pixels)
        return self.clip_of(row, read_views(opened, data, MIDDLE)[0], opened)

    def clip_of(self, row: VideoRow, clip_CTHW: Tensor, video: Video | None = None) -> VideoClip:
        """Return a clip that was read of a row already, as its middle view, with its times."""
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
        """Return how clips are cut, with another number of frames where one is given."""
        steps = self.candidate_steps * self.options.tubelet_size
        return replace(self.settings.data, num_frames=num_frames or steps or self.settings.data.num_frames)

    def examine(self, clip: VideoClip, rules: Sequence[tuple[str, SelectionRule]] | None = None) -> PicturedClip:
        """Return what the model does with a clip, as arrays.

        Args:
            clip: The clip; of candidate frames where the configuration selects frames.
            rules: Ways to keep tokens, each with a label; the model's own without.
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
        """Return which tokens a rule keeps, for people."""
        order = ", least changing first" if rule.order == "ascending" else ""
        distance = f", by {rule.distance}" if rule.strategy == "rero" and rule.distance != "l2" else ""
        return f"{rule.strategy} {rule.selected_ratio:g}{order}{distance}"

    def draw(self, video: VideoRow | Path | str) -> Image.Image:
        """Return the picture of the clip in the middle of a video: what is kept of it, and what is made of that.

        Raises:
            VideoReadError: The video cannot be read.
        """
        clip = self.read(video)
        return draw_clip(self.examine(clip), title=clip.row.path.name, lines=self.captions(clip))

    def captions(self, clip: VideoClip) -> list[str]:
        """Return which frames a picture of a clip is of, and which weights, for people."""
        chosen = f"; {self.grid.time} of their {self.candidate_steps} time steps are drawn by change"
        return [f"{clip.describe()}{chosen if self.candidate_steps else ''}", self.report.split("\n")[0]]


def load_model(
    origin: Origin, recipe: Config | None = None, *, weights: WeightsName = "auto", reader: ReaderName | None = None
) -> LoadedModel:
    """Load the model of a run, a checkpoint, or weights in any layout, on the CPU.

    Weights that do not say how clips are cut are given clips of the length and size of their positions, at a stride
    of 4 frames; the report says so.

    Args:
        origin: From `locate`.
        recipe: Says how clips are cut, for weights that do not.
        weights: Which of a checkpoint's weights.
        reader: Library that reads videos, instead of data.reader.

    Raises:
        UserError: Weights are damaged, of an unknown layout, or do not fit the recipe.
    """
    read = read_trained(origin, weights)
    config, note = _config_of(origin, recipe, read[1])
    options = InferenceOptions(num_temporal=1, num_spatial=1, weights=weights, reader=reader, precision="fp32")
    settings = clip_settings(origin, None if config is origin.config else config, options)
    settings = replace(settings, attention="auto")  # that of training may need a GPU
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
    """Return the embedding that a run of a configuration starts from, which ranks tokens but predicts nothing."""
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
        report=f"recipe {config.recipe}, ViT-{config.model.size}: fresh embedding of seed {config.run.seed}, no "
        "weights were given; it ranks tokens as the first step of training does",
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
    """Return the configuration that says how clips are cut, and a note where it was made up."""
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
            f"{weights.source} is of clips of {grid.cols * patch} x {grid.rows * patch} pixels and does not say "
            "how they are cut; give --recipe"
        )
    frames, edge = grid.time * tubelet, grid.rows * patch
    note = (
        f"\n  note          it does not say how clips are cut; here {frames} frames of {edge} pixels at stride 4 "
        "(--recipe says otherwise)"
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
        raise UserError(f"the configuration in {weights.source} is no JSON ({error}); give --recipe") from error
