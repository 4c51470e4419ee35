"""A trained model, ready for inference.

Place in the flow: Origin and ClipSettings -> `load_trained` -> a model in evaluation mode, in the chosen precision.
Axes: B clips, C T H W of a clip, V views of a video, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from everest_ds import distributed
from everest_ds.data.clips.views import ViewDataset
from everest_ds.data.lists.classes import NAMES_FILE
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.inference.passes import Passes, RowResults
from everest_ds.inference.source import ClipSettings, InferenceOptions, WeightsName, weights_kind
from everest_ds.model.attention import choose_backend
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.selection import keep_rule
from everest_ds.model.weights.architecture import Architecture, require_size
from everest_ds.model.weights.loading import load_weights
from everest_ds.model.weights.reading import Weights
from everest_ds.tokens import TokenGrid, describe_kept
from everest_ds.train.checkpoints.consolidated import read_any_weights
from everest_ds.train.checkpoints.origin import Origin
from everest_ds.train.ema import averaged
from everest_ds.train.precision import Precision, choose_precision


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model in evaluation mode, on the CPU until passes start.

    Attributes:
        model: The classifier; its head is fresh where the weights have none.
        settings: How clips are made from videos.
        has_head: Whether the weights have a head.
        class_names: A name for each class; empty without a head.
        kind: Which weights these are: model or ema.
        precision: Precision of the matmuls; the weights are float32.
        attention: The attention backend.
        num_kept: Tokens of a clip that go through the encoder.
        kept: The same as text.
        report: A text about what was loaded.
    """

    model: EverestClassifier
    settings: ClipSettings
    has_head: bool
    class_names: tuple[str, ...]
    kind: Literal["model", "ema"]
    precision: Precision
    attention: str
    num_kept: int
    kept: str
    report: str

    def start(self, options: InferenceOptions, world: World) -> Passes:
        """Join the process group, move the model to this rank's device, and return the settings of passes."""
        device = distributed.start(world)
        self.model.to(device)
        return Passes(
            group_size=options.batch_rows, world=world, device=device, allow_unreadable=options.allow_unreadable
        )

    def dataset(self, rows: Sequence[VideoRow]) -> ViewDataset:
        """Return the views of these videos."""
        return ViewDataset(rows, self.settings.data, self.settings.views)

    def wrap(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a method of the model that computes in the chosen precision and returns float32."""

        lowers = self.precision.matmul_dtype != torch.float32

        def run(clips_BCTHW: Tensor) -> Tensor:
            with torch.autocast(clips_BCTHW.device.type, torch.bfloat16, enabled=lowers):
                return function(clips_BCTHW).float()

        return run

    def features(self, rows: Sequence[VideoRow], passes: Passes, *, progress: str) -> RowResults[Tensor]:
        """Return each video's features, averaged over its views, (D,) float32. All ranks must call it; all get all.

        Raises:
            UserError: A video cannot be read, and the passes do not allow that.
        """
        return passes.map(
            self.wrap(self.model.pool),
            lambda row, features_VD: features_VD.double().mean(dim=0).float(),
            self.dataset(rows),
            progress=progress,
        )


def read_trained(origin: Origin, wanted: WeightsName) -> tuple[Literal["model", "ema"], Weights]:
    """Read weights, or a checkpoint's moving average; checked against their seal. Return which they are, and them.

    Raises:
        UserError: The weights are damaged or incomplete, or there is no average.
    """
    kind, weights = weights_kind(origin, wanted), read_any_weights(origin.weights)
    return kind, averaged(weights, origin.weights) if kind == "ema" else weights


def load_trained(
    origin: Origin,
    settings: ClipSettings,
    options: InferenceOptions,
    device: torch.device,
    read: tuple[Literal["model", "ema"], Weights] | None = None,
) -> Trained:
    """Read weights, checked against their seal, and build their model, on the CPU.

    The model has the norms, heads and positions of the weights. If the weights do not say which clips positions
    were made for, the settings do.

    Args:
        origin: Path of the weights.
        settings: How clips are made from videos.
        options: Which weights of a checkpoint, and the precision.
        device: Device on which the model will run.
        read: The result of `read_trained`, if it was called before.

    Raises:
        UserError: Weights are damaged or incomplete, clips do not fit their tubelets, or a backend is unavailable.
    """
    kind, weights = read or read_trained(origin, options.weights)
    weights, grid = _laid_out(weights, settings)
    shape = weights.architecture
    has_head = shape.kind == "classifier" and shape.num_classes is not None
    classifier = replace(
        shape,
        kind="classifier",
        num_classes=shape.num_classes if has_head else 1,
        options=replace(shape.options, attention=settings.attention),
    )
    _require_backed(classifier, weights)
    model = classifier.build(keep_rule(settings.selection))
    assert isinstance(model, EverestClassifier)
    ratio = settings.selection.keep_ratio
    if weights.keep_ratio not in (None, ratio):
        note = f"trained with keep_ratio={weights.keep_ratio:g} but used with {ratio:g}, which changes the scores"
        weights = replace(weights, notes=(*weights.notes, note))
    report = load_weights(model, weights, clip_grid=grid)
    precision = choose_precision({}, options.precision, device.type)
    head_dim = shape.width // (shape.num_heads or 1)
    backend = choose_backend(settings.attention, device, precision.matmul_dtype, head_dim)
    num_kept = model.rule.num_kept(grid)
    return Trained(
        model=model.eval().requires_grad_(False),
        settings=settings,
        has_head=has_head,
        class_names=_class_names(origin, weights, model.num_classes) if has_head else (),
        kind=kind,
        precision=precision,
        attention=backend.name,
        num_kept=num_kept,
        kept=describe_kept(ratio, num_kept, grid.num_tokens),
        report=report.describe(),
    )


def load_autoencoder(weights: Weights, settings: ClipSettings) -> tuple[EverestAutoencoder, str]:
    """Build the pre-training model of weights, in evaluation mode on the CPU; return it with a report.

    Raises:
        UserError: Weights are of another model or incomplete, or clips do not fit their tubelets.
    """
    weights, grid = _laid_out(weights, settings)
    shape = weights.architecture
    shape = replace(shape, options=replace(shape.options, attention=settings.attention))
    _require_backed(shape, weights)
    model = shape.build()
    assert isinstance(model, EverestAutoencoder)
    report = load_weights(model, weights, clip_grid=grid)
    return model.eval().requires_grad_(False), report.describe()


def _laid_out(weights: Weights, settings: ClipSettings) -> tuple[Weights, TokenGrid]:
    """Return weights with the grid of their positions, from the settings if unknown, and the clips' grid."""
    shape, data = weights.architecture, settings.data
    grid = _grid(shape, data.num_frames, data.image_size)
    if not shape.grid_is_known:
        shape = replace(shape, grid=_grid(shape, settings.position_frames, settings.position_size))
        weights = replace(weights, architecture=shape)
    return weights, grid


def _require_backed(shape: Architecture, weights: Weights) -> None:
    """Refuse weights that are a small part of the model that they describe, before it allocates memory."""
    claimed = sum(size.numel() for size in shape.expected_shapes.values())
    given = sum(tensor.numel() for tensor in weights.tensors.values())
    if claimed > 2 * given:
        raise UserError(
            f"{weights.source} contains only {given} of the {claimed} values of its model; use a complete file"
        )


def _grid(shape: Architecture, num_frames: int, edge: int) -> TokenGrid:
    """Return the token grid of clips of this length and size."""
    options = shape.options
    grid = TokenGrid.of_clip(
        num_frames=num_frames,
        height=edge,
        width=edge,
        tubelet_size=options.tubelet_size,
        patch_size=options.patch_size,
    )
    return require_size(grid, f"num_frames={num_frames}, image_size={edge}")


def _class_names(origin: Origin, weights: Weights, num_classes: int) -> tuple[str, ...]:
    """Return a name for each class, from the run or the weights; numbers if there are no names."""
    names = weights.architecture.labels
    if names is None:
        return tuple(str(k) for k in range(num_classes))
    if len(names) != num_classes:
        source = weights.source if origin.run_dir is None else origin.run_dir / NAMES_FILE
        raise UserError(f"{source} names {len(names)} classes, but the head has {num_classes}; correct the names")
    return names
