"""Widths, depths and heads of the named models.

Source: the official EVEREST and VideoMAE pre-training models. ViT-S has 6 heads there, though the Hugging Face
converter of VideoMAE says 16. The decoder's depth is a setting, not part of the size.
"""

from dataclasses import dataclass

from everest_ds.errors import UserError, nearest_hint


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Shape of an encoder and of its narrow decoder."""

    width: int
    depth: int
    num_heads: int
    decoder_width: int
    decoder_num_heads: int


SIZES: dict[str, ModelSize] = {
    "nano": ModelSize(width=64, depth=3, num_heads=2, decoder_width=64, decoder_num_heads=2),
    # ViT-L's depth at a negligible width: what remains of a step's time is the host's work.
    "thin": ModelSize(width=64, depth=24, num_heads=2, decoder_width=64, decoder_num_heads=2),
    "tiny": ModelSize(width=128, depth=4, num_heads=4, decoder_width=96, decoder_num_heads=3),
    "small": ModelSize(width=384, depth=12, num_heads=6, decoder_width=192, decoder_num_heads=3),
    "base": ModelSize(width=768, depth=12, num_heads=12, decoder_width=384, decoder_num_heads=6),
    "large": ModelSize(width=1024, depth=24, num_heads=16, decoder_width=512, decoder_num_heads=8),
    "huge": ModelSize(width=1280, depth=32, num_heads=16, decoder_width=640, decoder_num_heads=8),
}


def get_size(name: str) -> ModelSize:
    """Return the named size.

    Raises:
        UserError: There is no such size.
    """
    if name not in SIZES:
        raise UserError(f"unknown model size {name!r}{nearest_hint(name, SIZES)}")
    return SIZES[name]
