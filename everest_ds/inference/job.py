"""Options and jobs of the commands that use trained weights. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from everest_ds.config import Config
from everest_ds.config.sections import ReaderName
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.errors import UserError
from everest_ds.inference.source import ClipSettings, InferenceOptions, WeightsName
from everest_ds.train.checkpoints.origin import Origin

Target = Literal["everest", "videomae", "hf", "deepspeed-fp32"]


def require_folder(flag: str, path: Path | None) -> None:
    """Refuse a path that exists and is not a folder."""
    if path is not None and path.exists() and not path.is_dir():
        raise UserError(f"{flag} {path} is not a folder; name another one")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(InferenceOptions):
    """Options of `everest evaluate`: list, protocol and output."""

    list: Path | None = None
    """List of videos to score. Default: data.test_list of the run or the recipe."""
    out: Path | None = None
    """Folder for the results. Default: evaluation-LIST in the run directory or next to the weights."""
    protocol: Literal["head", "knn", "linear"] = "head"
    """head: the classifier itself; knn, linear: nearest neighbours or a linear probe on its frozen features."""
    train_list: Path | None = None
    """List of training videos for knn and linear."""
    knn_k: int = 20
    """Number of neighbours that vote (knn)."""
    knn_temperature: float = 0.07
    """Temperature of the votes, exp(cosine / temperature) (knn)."""
    linear_l2: float = 1e-3
    """Weight of half the squared norm of the probe's weights in its loss (linear)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.protocol == "head") != (self.train_list is None):
            given = "needs --train-list" if self.train_list is None else "does not use --train-list; remove it"
            raise UserError(f"--protocol {self.protocol} {given}")
        if self.knn_k < 1 or self.knn_temperature <= 0 or self.linear_l2 <= 0:
            raise UserError("--knn-k must be at least 1, --knn-temperature and --linear-l2 above 0")


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """A list to score.

    Attributes:
        origin: The weights.
        settings: How clips are made from videos.
        options: The options of the command.
        test_list: The list.
        rows: The rows of the list.
        train_rows: Rows of the training list of knn and linear.
        out: Folder for the results.
        identity: Fields that identify the results: protocol, checkpoint and list.
    """

    origin: Origin
    settings: ClipSettings
    options: EvaluateOptions
    test_list: Path
    rows: Sequence[VideoRow]
    train_rows: Sequence[VideoRow]
    out: Path
    identity: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PredictOptions(InferenceOptions):
    """Options of `everest predict`: videos and output."""

    list: Path | None = None
    """List of further videos, or of windows of videos. Labels are not used."""
    top: int = 5
    """Number of classes to print for each video."""
    json: bool = False
    """One JSON line a video instead of a table."""
    show: Path | None = None
    """Folder for a picture of each video, NAME.png: the tokens that the classifier kept, in the middle view."""
    features: Path | None = None
    """Write features instead of labels: a .safetensors file with one float32 row for each video, the mean of the
    kept tokens before the last norm, averaged over the views. The weights need no head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise UserError(f"--top {self.top} must be at least 1")
        require_folder("--show", self.show)
        if self.features is None:
            return
        if self.json:
            raise UserError("--json has no effect with --features; remove it")
        if self.show is not None:
            raise UserError("--show has no effect with --features; use `everest show` for pictures")
        if self.features.suffix != ".safetensors":
            raise UserError(f"--features {self.features} must end in .safetensors")
        if self.features.exists():
            raise UserError(f"--features {self.features} exists; remove it or name another file")


@dataclass(frozen=True, kw_only=True)
class PredictionJob:
    """Videos to classify, or to compute features of.

    Attributes:
        origin: The weights.
        settings: How clips are made from videos.
        options: The options of the command.
        rows: The videos, without labels.
    """

    origin: Origin
    settings: ClipSettings
    options: PredictOptions
    rows: Sequence[VideoRow]


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Options of `everest show`: videos, pictures and output."""

    out: Path
    """Folder for the pictures, NAME.png for each video."""
    recipe: str | None = None
    """Recipe, or config.json, with the settings for clips and kept tokens, for weights without a run."""
    list: Path | None = None
    """List of further videos, or of windows of videos."""
    ratios: tuple[float, ...] = ()
    """Shares of the tokens to keep, instead of the configuration's; each is drawn."""
    compare: bool = False
    """Draw the strategies rero, random, tube and running_cell below each other, with the same number of tokens."""
    frames: bool = False
    """Also draw the frame selection, NAME-frames.png: candidate frames, probabilities and selected frames. If the
    configuration selects no frames, there are 1.5 times as many candidates as frames of a clip."""
    gif: bool = False
    """Also write an animation, NAME.gif."""
    mp4: bool = False
    """Also write an animation in H.264, NAME.mp4."""
    weights: WeightsName = "auto"
    """ema: a checkpoint's moving average; model: the weights themselves; auto: the average if there is one."""
    reader: ReaderName | None = None
    """Library that reads videos, instead of data.reader."""
    allow_unreadable: bool = False
    """Exit with 0 although some videos could not be read. If none could, the exit code is still 2."""

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if not 0 < ratio <= 1:
                raise UserError(f"--ratios {ratio:g} must be a share of the clip's tokens, above 0 and at most 1")
        require_folder("--out", self.out)


@dataclass(frozen=True, kw_only=True)
class ShowJob:
    """Videos to draw pictures of.

    Attributes:
        origin: The weights; None draws with a fresh embedding.
        recipe: The configuration that was named as the source or by `ShowOptions.recipe`.
        options: The options of the command.
        rows: The videos.
    """

    origin: Origin | None
    recipe: Config | None
    options: ShowOptions
    rows: Sequence[VideoRow]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Options of `everest convert`: layout and weights."""

    to: Target
    """everest: a float32 .safetensors file; videomae: a .pth file in the official layout; hf: a Hugging Face
    folder; deepspeed-fp32: everest with a run's step and configuration."""
    allow: tuple[str, ...] = ()
    """Tensors or modules of SRC to leave out."""
    weights: Literal["model", "ema"] = "model"
    """model: the weights themselves; ema: the run's moving average (optim.ema_decay), which `everest evaluate`
    scores."""
    recipe: str | None = None
    """With --to hf: recipe, or config.json, with the settings for clips and for the tokens that a classifier keeps,
    for weights without a run."""

    def __post_init__(self) -> None:
        """Refuse options that have no effect."""
        if self.recipe is not None and self.to != "hf":
            raise UserError(f"--recipe {self.recipe} has no effect with --to {self.to}; remove it")
        if self.to != "deepspeed-fp32":
            return
        if self.allow:
            raise UserError(f"--allow {' '.join(self.allow)} has no effect with --to deepspeed-fp32; remove it")
        if self.weights != "model":
            raise UserError("--weights ema cannot be written with --to deepspeed-fp32; use --to everest")


@dataclass(frozen=True, kw_only=True)
class ConversionJob:
    """Weights to convert.

    Attributes:
        source: A run or checkpoint; except for deepspeed-fp32 also any file or folder of weights.
        target: The file or folder to write.
        options: The options of the command.
        recipe: The configuration that `options.recipe` names.
    """

    source: Path
    target: Path
    options: ConvertOptions
    recipe: Config | None
