"""A trained model, ready to look at videos.

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
        settings: How it looks at videos.
        has_head: Whether the weights have a head.
        class_names: Of each class; empty without a head.
        kind: Which weights these are: model or ema.
        precision: What it computes in, as asked for; its weights are float32.
        attention: The attention backend.
        num_kept: Tokens of a clip that go through the encoder.
        kept: The same in words.
        report: What was loaded, for people.
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
        """Let all ranks meet, move the model to this rank's device, and return how passes run there."""
        device = distributed.start(world)
        self.model.to(device)
        return Passes(
            group_size=options.batch_rows, world=world, device=device, allow_unreadable=options.allow_unreadable
        )

    def dataset(self, rows: Sequence[VideoRow]) -> ViewDataset:
        """Return the views of some videos."""
        return ViewDataset(rows, self.settings.data, self.settings.views)

    def wrap(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a method of the model that computes in the chosen precision and returns float32."""

        lowers = self.precision.matmul_dtype != torch.float32

        def run(clips_BCTHW: Tensor) -> Tensor:
            with torch.autocast(clips_BCTHW.device.type, torch.bfloat16, enabled=lowers):
                return function(clips_BCTHW).float()

        return run

    def features(self, rows: Sequence[VideoRow], passes: Passes, *, progress: str) -> RowResults[Tensor]:
        """Return each video's features, averaged over its views, (D,) float32; all ranks take part and get all.

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
    """Read weights, checked against their seal, or a checkpoint's average of them; returns which they are.

    Raises:
        UserError: They are damaged or incomplete, or there is no average.
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

    The model is that of the weights, with their norms, heads and positions; where they do not say what positions
    are laid out for, the settings do.

    Args:
        origin: Where they are.
        settings: What the model looks at.
        options: Which of a checkpoint's weights, and the precision.
        device: Where it will run.
        read: What `read_trained` returned, where that was called before.

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
        note = (
            f"trained with keep_ratio={weights.keep_ratio:g} and used with {ratio:g} here, which changes the scores"
        )
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
    """Build the pre-training model of weights, in evaluation mode on the CPU; returns what was loaded, for people.

    Raises:
        UserError: They are of another model, incomplete, or clips do not fit their tubelets.
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
    """Return weights whose positions are known, by the settings where they do not say, and the clips' grid."""
    shape, data = weights.architecture, settings.data
    grid = _grid(shape, data.num_frames, data.image_size)
    if not shape.grid_is_known:
        shape = replace(shape, grid=_grid(shape, settings.position_frames, settings.position_size))
        weights = replace(weights, architecture=shape)
    return weights, grid


def _require_backed(shape: Architecture, weights: Weights) -> None:
    """Refuse weights that are a small part of the model that they claim, before it takes its memory."""
    claimed = sum(size.numel() for size in shape.expected_shapes.values())
    given = sum(tensor.numel() for tensor in weights.tensors.values())
    if claimed > 2 * given:
        raise UserError(
            f"{weights.source} holds {given} of the {claimed} values of its model; expected all of them"
        )


def _grid(shape: Architecture, num_frames: int, edge: int) -> TokenGrid:
    """Return the tokens of clips of this length and size in a model."""
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
    """Return a name for each class: the run's or the weights' own, else numbers."""
    names = weights.architecture.labels
    if names is None:
        return tuple(str(k) for k in range(num_classes))
    if len(names) != num_classes:
        source = weights.source if origin.run_dir is None else origin.run_dir / NAMES_FILE
        raise UserError(f"{source} names {len(names)} classes, the head has {num_classes}; mend the names")
    return names
