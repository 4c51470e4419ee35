"""The models under timm's names: ``timm.create_model("everest_vit_large_patch16_224")``.

Importing this module registers, for small, base, large and huge,

    everest_vit_{size}_patch16_224            `EverestClassifier`: num_classes=400, keep_ratio=0.6, ...
    everest_pretrain_vit_{size}_patch16_224   `EverestAutoencoder`: decoder_depth=4, ...

Both take num_frames=16, img_size=224, and the fields of `EncoderOptions`. There are no weights to download;
`pretrained=True` is refused.
"""

from dataclasses import fields
from typing import Any

from timm.models import register_model
from torch import nn

from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.selection import SelectionRule
from everest_ds.model.sizes import get_size
from everest_ds.tokens import TokenGrid

__all__: list[str] = []  # timm's decorator adds each registered function

TIMM_SIZES = ("small", "base", "large", "huge")
_ENCODER_OPTIONS = tuple(field.name for field in fields(EncoderOptions))
# Arguments about hosted weights that timm passes to every model function; not used here.
_HUB_OPTIONS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def _register(name: str, size: str, model_class: type[nn.Module], **defaults: Any) -> None:
    def create(pretrained: bool = False, num_frames: int = 16, img_size: int = 224, **given: Any) -> nn.Module:
        """Build the model; options are those of `EncoderOptions` and of the model's class."""
        if pretrained:
            raise ValueError(f"{name}: no pretrained weights are hosted; load a checkpoint into the model instead")
        own = {**defaults, **{key: value for key, value in given.items() if key not in _HUB_OPTIONS}}
        options = EncoderOptions(**{key: own.pop(key) for key in _ENCODER_OPTIONS if key in own})
        grid = TokenGrid.of_clip(
            num_frames=num_frames,
            height=img_size,
            width=img_size,
            tubelet_size=options.tubelet_size,
            patch_size=options.patch_size,
        )
        if "keep_ratio" in own:
            own["rule"] = SelectionRule(selected_ratio=own.pop("keep_ratio"))
        return model_class(get_size(size), grid, options, **own)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{model_class.__name__}, ViT-{size[0].upper()}."
    register_model(create)


for _size in TIMM_SIZES:
    _register(f"everest_vit_{_size}_patch16_224", _size, EverestClassifier, num_classes=400)
    _register(f"everest_pretrain_vit_{_size}_patch16_224", _size, EverestAutoencoder)
