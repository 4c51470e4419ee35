"""What is wanted of trained weights, known before torch is imported."""

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
    """Refuse to write into something that is not a folder."""
    if path is not None and path.exists() and not path.is_dir():
        raise UserError(f"{flag} {path} is no folder; name another one")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(InferenceOptions):
    """What is scored, how, and where the results go."""

    list: Path | None = None
    """List of videos to score; without one, data.test_list of the run or the recipe."""
    out: Path | None = None
    """Folder for the results; without one, evaluation-LIST in the run directory or beside the weights."""
    protocol: Literal["head", "knn", "linear"] = "head"
    """head: the classifier itself; knn, linear: nearest neighbours or a linear probe on its frozen features."""
    train_list: Path | None = None
    """List of videos that knn and linear learn from."""
    knn_k: int = 20
    """Neighbours that vote (knn)."""
    knn_temperature: float = 0.07
    """Temperature of their votes, exp(cosine / temperature) (knn)."""
    linear_l2: float = 1e-3
    """Weight of half the squared norm of the probe's weights in its loss (linear)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.protocol == "head") != (self.train_list is None):
            given = "needs --train-list" if self.train_list is None else "takes no --train-list"
            raise UserError(f"--protocol {self.protocol} {given}")
        if self.knn_k < 1 or self.knn_temperature <= 0 or self.linear_l2 <= 0:
            raise UserError("--knn-k must be at least 1, --knn-temperature and --linear-l2 above 0")


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """A list that is to be scored.

    Attributes:
        origin: The weights.
        settings: How they look at videos.
        options: What is scored, and how.
        test_list: The list.
        rows: Its rows.
        train_rows: Rows of the list that knn and linear learn from.
        out: Folder for the results.
        identity: What tells these results from others: protocol, checkpoint and list.
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
    """What is said of each video."""

    list: Path | None = None
    """List of videos, after those that are named: each row, or the window of it. Labels are not used."""
    top: int = 5
    """Classes to name for each video."""
    json: bool = False
    """One JSON line a video instead of a table."""
    show: Path | None = None
    """Folder for a picture of each video, NAME.png: the tokens that the classifier looked at, in the view in the
    middle."""
    features: Path | None = None
    """Write features instead of labels: a .safetensors file with a float32 row a video, the mean of the kept
    tokens before the last norm, averaged over the views. The weights need no head."""

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
    """Videos that are to be labelled, or whose features are wanted.

    Attributes:
        origin: The weights.
        settings: How they look at videos.
        options: What is said of them.
        rows: The videos, without labels.
    """

    origin: Origin
    settings: ClipSettings
    options: PredictOptions
    rows: Sequence[VideoRow]


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """What is drawn of each video, and where."""

    out: Path
    """Folder for the pictures, NAME.png for each video."""
    recipe: str | None = None
    """Recipe, or config.json, that says how clips are cut and which tokens are kept, for weights without a run."""
    list: Path | None = None
    """List of videos, after those that are named: each row, or the window of it."""
    ratios: tuple[float, ...] = ()
    """Shares of the tokens to keep, each drawn, instead of the configuration's."""
    compare: bool = False
    """Draw the strategies rero, random, tube and running_cell below each other, each with as many tokens."""
    frames: bool = False
    """Also draw the frame selection, NAME-frames.png: candidates, probabilities and drawn frames (1.5 times a
    clip's frames are candidates where the configuration selects none)."""
    gif: bool = False
    """Also write the picture as it moves, NAME.gif."""
    mp4: bool = False
    """The same as H.264, NAME.mp4."""
    weights: WeightsName = "auto"
    """ema: a checkpoint's moving average; model: the weights themselves; auto: the average where there is one."""
    reader: ReaderName | None = None
    """Library that reads videos, instead of data.reader."""
    allow_unreadable: bool = False
    """Exit with 0 although videos could not be read, unless none could."""

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if not 0 < ratio <= 1:
                raise UserError(f"--ratios {ratio:g} must be a share of the clip's tokens, above 0 and at most 1")
        require_folder("--out", self.out)


@dataclass(frozen=True, kw_only=True)
class ShowJob:
    """Videos of which pictures are wanted.

    Attributes:
        origin: The weights; None draws with a fresh embedding.
        recipe: The configuration that was named, of the source or by `ShowOptions.recipe`.
        options: What is drawn.
        rows: The videos.
    """

    origin: Origin | None
    recipe: Config | None
    options: ShowOptions
    rows: Sequence[VideoRow]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What is written, and what of the source."""

    to: Target
    """everest: a float32 .safetensors file; videomae: a .pth file in the official layout; hf: a Hugging Face
    folder; deepspeed-fp32: everest with a run's step and configuration."""
    allow: tuple[str, ...] = ()
    """Tensors or modules that may be in SRC and are left out."""
    weights: Literal["model", "ema"] = "model"
    """ema: the moving average that a run keeps (optim.ema_decay), which `everest evaluate` scores."""
    recipe: str | None = None
    """With --to hf: recipe, or config.json, that says how clips are cut and which tokens a classifier keeps, for
    weights that come without a run."""

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
    """Weights that are to be written.

    Attributes:
        source: A run or checkpoint; for all but deepspeed-fp32 also any file or folder of weights.
        target: What to write.
        options: The layout, and what of the source.
        recipe: What `options.recipe` names.
    """

    source: Path
    target: Path
    options: ConvertOptions
    recipe: Config | None
