"""How clips are made from videos for a trained model, from its run, a recipe and the options.

Place in the flow: PATH -> `locate` -> Origin -> `clip_settings` -> ClipSettings -> `inference.trained`.
Needs no torch, so that wrong input is refused before torch is imported.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from everest_ds.config import Config, FinetuneConfig, FinetuneDataConfig, FinetuneSelectionConfig, ViewsConfig
from everest_ds.config.sections import ReaderName
from everest_ds.errors import UserError
from everest_ds.files import sha256
from everest_ds.train.checkpoints.origin import Origin
from everest_ds.train.checkpoints.save import AVERAGE, read_state
from everest_ds.train.checkpoints.seal import SEAL
from everest_ds.train.precision import PrecisionName

WeightsName = Literal["auto", "model", "ema"]
Section = TypeVar("Section", FinetuneDataConfig, ViewsConfig, FinetuneSelectionConfig)


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Options of all commands that run a trained model on videos."""

    recipe: str | None = None
    """Recipe, or config.json, with the settings for clips, for weights without a run."""
    num_temporal: int | None = None
    """Number of clips over time of each video, instead of views.num_temporal."""
    num_spatial: int | None = None
    """Number of crops over space of each clip, instead of views.num_spatial."""
    keep_ratio: float | None = None
    """Share of a clip's tokens to keep, instead of selection.keep_ratio; 1 keeps all."""
    weights: WeightsName = "auto"
    """ema: a checkpoint's moving average; model: the weights themselves; auto: the average if there is one."""
    precision: PrecisionName = "auto"
    """auto: bf16 on a GPU and fp32 on a CPU. Weights are always float32, so bf16 and autocast are the same here:
    matmuls in bfloat16."""
    batch_rows: int = 4
    """Videos in one forward pass, with all their views. It changes the last bits of results."""
    num_workers: int | None = None
    """Loader workers of each process, instead of data.num_workers; 0 decodes in the process itself."""
    reader: ReaderName | None = None
    """Library that reads videos, instead of data.reader."""
    allow_unreadable: bool = False
    """Leave out and list unreadable videos instead of stopping."""

    def __post_init__(self) -> None:
        """Check the numbers that no configuration checks."""
        if self.batch_rows < 1:
            raise UserError(f"--batch-rows {self.batch_rows} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """How clips are made from videos, and which tokens are kept.

    Attributes:
        data: Length, stride, size and sampling of clips, and the loader's settings.
        views: Number of clips of a video.
        selection: Which tokens are kept.
        attention: Attention backend.
        position_frames: Number of frames that positions were made for, if the weights do not say.
        position_size: Height and width that positions were made for, in pixels.
    """

    data: FinetuneDataConfig
    views: ViewsConfig
    selection: FinetuneSelectionConfig
    attention: str
    position_frames: int
    position_size: int

    @property
    def num_views(self) -> int:
        """Clips of each video."""
        return self.views.num_temporal * self.views.num_spatial


def clip_settings(origin: Origin, recipe: Config | None, options: InferenceOptions) -> ClipSettings:
    """Return the settings of the run or the recipe, changed by the options.

    From a pre-training configuration come length, stride and size of clips. There is then one view, and the keep
    ratio is the default of fine-tuning.

    Raises:
        UserError: There is no configuration, or both a run's and a recipe, or a setting is wrong.
    """
    config = origin.config if recipe is None else recipe
    if config is None:
        raise UserError(
            f"{origin.given} has no settings for clips; give --recipe, the name of a recipe (`everest recipes` "
            "lists them) or a config.json"
        )
    if recipe is not None and isinstance(origin.config, FinetuneConfig):
        raise UserError(
            f"--recipe {options.recipe} has no effect: {origin.given} belongs to a run with its own settings for "
            "clips; remove --recipe"
        )
    if isinstance(config, FinetuneConfig):
        data, views, selection = config.data, config.views, config.selection
    else:
        names = (
            "num_frames", "sampling_stride", "sampling_seconds", "image_size", "reader", "num_workers",
            "prefetch_batches", "timeout_s",
        )  # fmt: skip
        data = FinetuneDataConfig(**{name: getattr(config.data, name) for name in names})
        views = ViewsConfig(num_temporal=1, num_spatial=1)
        selection = FinetuneSelectionConfig()
    return ClipSettings(
        data=_with_given(data, num_workers=options.num_workers, reader=options.reader),
        views=_with_given(views, num_temporal=options.num_temporal, num_spatial=options.num_spatial),
        selection=_with_given(selection, keep_ratio=options.keep_ratio),
        attention=config.model.attention,
        position_frames=config.model.position_frames or config.data.num_frames,
        position_size=config.model.position_size or config.data.image_size,
    )


def _with_given(section: Section, **values: Any) -> Section:
    """Replace the fields whose values are given."""
    return replace(section, **{name: value for name, value in values.items() if value is not None})


def identify(origin: Origin, kind: str) -> dict[str, Any]:
    """Return fields that identify weights: names, step, and a checksum that covers every file."""
    path = origin.weights
    in_run = origin.run_dir is not None
    return {
        "path": str(origin.given),
        "name": path.name,
        "step": read_state(path).step if in_run else None,
        "weights": kind,
        "sha256": sha256(path / SEAL if in_run else path),
    }


def weights_kind(origin: Origin, wanted: WeightsName) -> Literal["model", "ema"]:
    """Return which weights of a checkpoint to use.

    Raises:
        UserError: The average was asked for, and there is none.
    """
    there = origin.run_dir is not None and (origin.weights / AVERAGE).is_file()
    if wanted == "ema" and not there:
        raise UserError(f"--weights ema: {origin.weights} has no {AVERAGE}; use --weights model")
    return "ema" if there and wanted != "model" else "model"
