"""everest_ds: a DeepSpeed trainer for EVEREST, masked video autoencoders that keep the tokens that change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from everest_ds.inference.loaded import LoadedModel

__version__ = "0.2.0"


def load(source: str | Path, *, recipe: str | None = None) -> LoadedModel:
    """Load a trained model, with the settings that clips are made with for it.

    >>> import everest_ds
    >>> loaded = everest_ds.load("weights.safetensors")
    >>> loaded.draw("video.mp4").save("picture.png")
    >>> clip = loaded.read("video.mp4").clip_CTHW
    >>> clip.shape, clip.dtype
    (torch.Size([3, 16, 48, 48]), torch.uint8)
    >>> type(loaded.model).__name__
    'EverestAutoencoder'

    Args:
        source: A run directory (its best checkpoint if it has one, else its newest), a checkpoint, or a file or
            folder of weights in any layout that `everest convert` reads.
        recipe: Name of a recipe, or path of a config.json, for weights that come without these settings.

    Returns:
        The model in evaluation mode on the CPU, with `read`, `examine` and `draw` for videos.

    Raises:
        UserError: The source does not exist, or its weights are damaged or of an unknown layout.
    """
    from everest_ds.inference.loaded import load_model
    from everest_ds.recipes import find_config
    from everest_ds.train.checkpoints.origin import locate

    return load_model(locate(Path(source)), find_config(recipe) if recipe else None)
