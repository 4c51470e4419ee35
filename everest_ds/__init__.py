"""everest_ds: DeepSpeed trainer for EVEREST, masked video autoencoders over the tokens whose content changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from everest_ds.inference.loaded import LoadedModel

__version__ = "0.2.0"


def load(source: str | Path, *, recipe: str | None = None) -> LoadedModel:
    """Load a trained model and how clips are cut for it.

    >>> import everest_ds
    >>> loaded = everest_ds.load("weights.safetensors")
    >>> loaded.draw("video.mp4").save("picture.png")
    >>> clip = loaded.read("video.mp4").clip_CTHW
    >>> clip.shape, clip.dtype
    (torch.Size([3, 16, 48, 48]), torch.uint8)
    >>> type(loaded.model).__name__
    'EverestAutoencoder'

    Args:
        source: A run directory (its best checkpoint where it has one, else its newest), a checkpoint, or a file or
            folder of weights in any layout that `everest convert` reads.
        recipe: Recipe, or path of a config.json, that says how clips are cut, for weights that do not say.

    Returns:
        The model in evaluation mode on the CPU, with `read`, `examine` and `draw` for videos.

    Raises:
        UserError: Nothing is there, or the weights are damaged or of an unknown layout.
    """
    from everest_ds.inference.loaded import load_model
    from everest_ds.recipes import find_config
    from everest_ds.train.checkpoints.origin import locate

    return load_model(locate(Path(source)), find_config(recipe) if recipe else None)
