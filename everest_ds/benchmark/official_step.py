"""The official EVEREST and VideoMAE code, read from a folder of the user's, as something that takes one step.

Place in the flow: `benchmark.compare` measures it beside ours. Nothing of that code is in this project:
its model and its training loop are imported from the folder and run as they are, targets and loss included. What it
expects around itself and does not find, on a CPU or with today's packages, is put there while it is imported or
runs, and taken away again:

    utils                        its book-keeping, replaced by one that keeps nothing: the original wants a module
                                 that torch no longer has. A step becomes cheaper by it, never dearer.
    timm.models.layers           today's name is timm.layers
    timm.models.registry         the models are called by name, and not registered with timm
    torch.cuda.amp.autocast      in the dtype that is measured, on the device that is measured
    torch.cuda.synchronize       does nothing on a CPU
"""

import contextlib
import importlib
import io
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everest_ds.benchmark.step_options import ReferenceName
from everest_ds.config import PretrainConfig
from everest_ds.errors import UserError

# What is imported of the folder, in this order; all are plain names that two folders share.
MODULES = ("modeling_finetune", "modeling_pretrain", "engine_for_pretraining")
# The only clips that the official models take.
FRAMES, IMAGE_SIZE, TUBELET, PATCH = 16, 224, 2, 16


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where official code comes from.

    Attributes:
        name: What it is compared as.
        variable: Environment variable that names the user's folder.
        repository: Where to get it.
        factory: Function of its modeling_pretrain.py that makes the model of a size.
    """

    name: ReferenceName
    variable: str
    repository: str
    factory: str


SOURCES: dict[ReferenceName, Source] = {
    source.name: source
    for source in (
        Source(
            name="everest",
            variable="EVEREST_REFERENCE_DIR",
            repository="https://github.com/sunilhoho/EVEREST",
            factory="pretrain_videoms_{size}_patch16_224",
        ),
        Source(
            name="videomae",
            variable="VIDEOMAE_REFERENCE_DIR",
            repository="https://github.com/MCG-NJU/VideoMAE",
            factory="pretrain_videomae_{size}_patch16_224",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class OfficialCode:
    """What is used of a folder.

    Attributes:
        source: Whose it is.
        make_model: Makes the model.
        train_one_epoch: Runs its training loop over batches.
    """

    source: Source
    make_model: Callable[..., nn.Module]
    train_one_epoch: Callable[..., Any]


def require_comparable(config: PretrainConfig, names: Iterable[ReferenceName]) -> None:
    """Refuse a run that the official code cannot do.

    Raises:
        UserError: Another clip, tubelet or embedding than theirs; or, against EVEREST, another selection.
    """
    found = (config.data.num_frames, config.data.image_size, config.model.tubelet_size, config.model.patch_size)
    if found != (FRAMES, IMAGE_SIZE, TUBELET, PATCH):
        raise UserError(
            f"--compare: the official code takes {FRAMES} frames of {IMAGE_SIZE} pixels in tubelets of {TUBELET} x "
            f"{PATCH} x {PATCH}, got {found[0]} of {found[1]} in tubelets of {found[2]} x {found[3]} x {found[3]}; "
            "use such a recipe, k400_vit_b for instance"
        )
    if config.model.size not in ("small", "base", "large", "huge") or config.model.embedding_layers != 1:
        raise UserError(
            f"--compare: the official models are small, base, large and huge with one embedding layer, got "
            f"model.size={config.model.size}, model.embedding_layers={config.model.embedding_layers}"
        )
    selection = config.selection
    ours = (selection.strategy, selection.order, selection.distance, selection.targets, selection.budget)
    if "everest" in names and (ours != ("rero", "descending", "l2", "masked", "clip") or selection.alpha > 1):
        raise UserError(
            "--compare everest: the official code selects by rero, the most changing tokens by l2, the same share "
            f"of every clip, and predicts the masked ones, from the clip's own frames; got {', '.join(ours)}, "
            f"alpha {selection.alpha}"
        )


def load_official(name: ReferenceName, size: str) -> OfficialCode:
    """Import official code from the folder that its environment variable names.

    Raises:
        UserError: The variable is not set, the folder is none or lacks a file or function, or a package that the
            code needs is not installed; the message names what to set or install.
    """
    source = SOURCES[name]
    given = os.environ.get(source.variable)
    if not given:
        raise UserError(
            f"--compare {name}: {source.variable} is not set; clone {source.repository} and set it to the folder"
        )
    folder = Path(given)
    for module in MODULES:
        if not (folder / f"{module}.py").is_file():
            raise UserError(
                f"--compare {name}: {source.variable}={given} has no {module}.py; set it to a clone of "
                f"{source.repository}"
            )
    try:
        with _importable(folder):
            modules = {module: importlib.import_module(module) for module in MODULES}
    except ModuleNotFoundError as error:
        raise UserError(f"--compare {name}: the code in {given} needs {error.name}; pip install it") from error
    factory = source.factory.format(size=size)
    for module, function in (("modeling_pretrain", factory), ("engine_for_pretraining", "train_one_epoch")):
        if not hasattr(modules[module], function):
            raise UserError(
                f"--compare {name}: {folder / module}.py has no {function}; set {source.variable} to a clone of "
                f"{source.repository}"
            )
    return OfficialCode(
        source=source,
        make_model=getattr(modules["modeling_pretrain"], factory),
        train_one_epoch=modules["engine_for_pretraining"].train_one_epoch,
    )


def make_official_model(official: OfficialCode, config: PretrainConfig) -> nn.Module:
    """Return their model of a configuration's size, decoder and ratios, freshly initialised."""
    options: dict[str, Any] = {"decoder_depth": config.model.decoder_depth}
    options["use_checkpoint"] = config.model.activation_checkpointing
    if official.source.name == "everest":
        options["motion_centric_masking"] = True
        # They are given as what is left out, and truncated there: 1 - 0.3 and 1 - 0.1 give 470 and 156 of 1568.
        options["motion_centric_masking_ratio"] = 1 - config.selection.selected_ratio
        options["masking_ratio"] = 1 - config.selection.visible_ratio
    return official.make_model(**options)


class OfficialStep:
    """Forward and backward pass as the official training loop does them; no optimiser step.

    Args:
        official: The code.
        model: Their model, on its device.
        dtype: What autocast computes in; float32 means no autocast.
    """

    def __init__(self, official: OfficialCode, model: nn.Module, dtype: torch.dtype) -> None:
        self.official = official
        self.model = model
        self.dtype = dtype
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters())  # only clears gradients
        self.losses = _BackwardOnly()

    def __call__(self, videos_BCTHW: Tensor, mask_BN: Tensor) -> float:
        """Take a step and return its loss.

        Args:
            videos_BCTHW: Standardised clips, float32, as their loader hands them over.
            mask_BN: True where the encoder does not see a token; EVEREST makes its own and ignores it.
        """
        with _surroundings(self.device, self.dtype), contextlib.redirect_stdout(io.StringIO()):
            self.official.train_one_epoch(
                self.model,
                [(videos_BCTHW, mask_BN)],
                self.optimizer,
                self.device,
                0,
                self.losses,
                patch_size=PATCH,
                normlize_target=True,
                start_steps=0,
            )
        return self.losses.last


class _BackwardOnly:
    """Stands where the official loop has its gradient scaler: backward, and nothing after it."""

    last = float("nan")

    def __call__(self, loss: Tensor, optimizer: Any, **options: Any) -> None:
        loss.backward()
        self.last = float(loss.detach())

    def state_dict(self) -> dict[str, float]:
        """Return what the loop writes down of it."""
        return {"scale": 1.0}


class _NoMetrics:
    """Stands where the official loop has its metrics: hands the batches over and keeps nothing."""

    def __init__(self, **options: Any) -> None:
        self.meters: dict[str, Any] = {}

    def log_every(self, batches: Iterable[Any], *options: Any) -> Iterator[Any]:
        """Yield the batches."""
        yield from batches

    def add_meter(self, *given: Any) -> None:
        """Keep nothing."""

    def update(self, **values: Any) -> None:
        """Keep nothing."""

    def synchronize_between_processes(self) -> None:
        """Have nothing to share."""


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Make a folder's modules importable, with what they expect; leave no trace in sys or in the folder."""
    import timm.layers
    import timm.models

    registry = types.ModuleType("timm.models.registry")
    registry.register_model = lambda make: make  # type: ignore[attr-defined]
    utils = types.ModuleType("utils")
    utils.MetricLogger = _NoMetrics  # type: ignore[attr-defined]
    utils.SmoothedValue = lambda **options: None  # type: ignore[attr-defined]
    ours = {"timm.models.layers": timm.layers, "timm.models.registry": registry, "utils": utils}
    names = (*ours, *MODULES)
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    wrote_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules.update(ours)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        sys.dont_write_bytecode = wrote_bytecode


@contextlib.contextmanager
def _surroundings(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Give the official loop the autocast and the device that are measured."""

    def autocast() -> torch.autocast:
        half = dtype != torch.float32
        return torch.autocast(device.type, dtype=dtype if half else torch.bfloat16, enabled=half)

    before = torch.cuda.amp.autocast, torch.cuda.synchronize
    torch.cuda.amp.autocast = autocast  # type: ignore[assignment, misc]
    if device.type != "cuda":
        torch.cuda.synchronize = lambda device=None: None
    try:
        yield
    finally:
        torch.cuda.amp.autocast, torch.cuda.synchronize = before  # type: ignore[misc]
