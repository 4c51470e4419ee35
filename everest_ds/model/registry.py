"""The models under timm's names: ``timm.create_model("everest_vit_large_patch16_224")``.

Importing this module registers, for small, base, large and huge,

    everest_vit_{size}_patch16_224            `EverestClassifier`: num_classes=400, keep_ratio=0.6, ...
    everest_pretrain_vit_{size}_patch16_224   `EverestAutoencoder`: decoder_depth=4, ...

Both take num_frames=16 and img_size=224, and the options of their class. There are no weights to download;
`pretrained=True` is refused.
"""

from timm.models import register_model
from torch import nn

from everest_ds.geometry import TokenGrid
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.sizes import get_size

__all__: list[str] = []  # timm's decorator adds each registered function

TIMM_SIZES = ("small", "base", "large", "huge")
# What timm hands to every model function about where weights come from.
_HUB_OPTIONS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def _register(name: str, size: str, model_class: type[nn.Module], **defaults: object) -> None:
    def create(pretrained: bool = False, num_frames: int = 16, img_size: int = 224, **options: object) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name}: no pretrained weights are hosted; load a checkpoint into the model instead")
        for option in _HUB_OPTIONS:
            options.pop(option, None)
        grid = TokenGrid.of_clip(
            num_frames=num_frames, height=img_size, width=img_size, tubelet_size=2, patch_size=16
        )
        return model_class(get_size(size), grid, **{**defaults, **options})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{model_class.__name__}, ViT-{size[0].upper()}."
    register_model(create)


for _size in TIMM_SIZES:
    _register(f"everest_vit_{_size}_patch16_224", _size, EverestClassifier, num_classes=400)
    _register(f"everest_pretrain_vit_{_size}_patch16_224", _size, EverestAutoencoder)
