"""The models under timm's names: ``timm.create_model("everest_vit_large_patch16_224")``.

Importing this module registers `everest_vit_*` (classifiers and backbones) and `everest_pretrain_vit_*`
(autoencoders). There are no weights to download; `pretrained=True` is refused.
"""

from timm.models import register_model

from everest_ds.geometry import TokenGrid
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.sizes import get_size

__all__: list[str] = []  # timm's decorator adds each registered function


def _grid(num_frames: int, img_size: int) -> TokenGrid:
    return TokenGrid.of_clip(num_frames=num_frames, height=img_size, width=img_size, tubelet_size=2, patch_size=16)


def _classifier(
    size: str,
    *,
    pretrained: bool,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    num_classes: int = 400,
    num_frames: int = 16,
    img_size: int = 224,
    keep_ratio: float = 0.6,
    embedding_layers: int = 1,
    attention_backend: str = "auto",
) -> EverestClassifier:
    _refuse_pretrained(pretrained)
    return EverestClassifier(
        get_size(size),
        _grid(num_frames, img_size),
        num_classes=num_classes,
        keep_ratio=keep_ratio,
        embedding_layers=embedding_layers,
        attention_backend=attention_backend,
    )


def _autoencoder(
    size: str,
    *,
    pretrained: bool,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    decoder_depth: int = 4,
    num_frames: int = 16,
    img_size: int = 224,
    embedding_layers: int = 1,
    attention_backend: str = "auto",
) -> EverestAutoencoder:
    _refuse_pretrained(pretrained)
    return EverestAutoencoder(
        get_size(size),
        _grid(num_frames, img_size),
        decoder_depth=decoder_depth,
        embedding_layers=embedding_layers,
        attention_backend=attention_backend,
    )


def _refuse_pretrained(pretrained: bool) -> None:
    if pretrained:
        raise ValueError("no pretrained weights are hosted; create the model and load a checkpoint into it")


@register_model
def everest_vit_small_patch16_224(pretrained: bool = False, **options: object) -> EverestClassifier:
    """Classifier, ViT-S: width 384, 12 blocks, 6 heads."""
    return _classifier("small", pretrained=pretrained, **options)  # type: ignore[arg-type]


@register_model
def everest_vit_base_patch16_224(pretrained: bool = False, **options: object) -> EverestClassifier:
    """Classifier, ViT-B: width 768, 12 blocks, 12 heads."""
    return _classifier("base", pretrained=pretrained, **options)  # type: ignore[arg-type]


@register_model
def everest_vit_large_patch16_224(pretrained: bool = False, **options: object) -> EverestClassifier:
    """Classifier, ViT-L: width 1024, 24 blocks, 16 heads."""
    return _classifier("large", pretrained=pretrained, **options)  # type: ignore[arg-type]


@register_model
def everest_vit_huge_patch16_224(pretrained: bool = False, **options: object) -> EverestClassifier:
    """Classifier, ViT-H: width 1280, 32 blocks, 16 heads."""
    return _classifier("huge", pretrained=pretrained, **options)  # type: ignore[arg-type]


@register_model
def everest_pretrain_vit_small_patch16_224(pretrained: bool = False, **options: object) -> EverestAutoencoder:
    """Autoencoder, ViT-S with a decoder of width 192 and 3 heads."""
    return _autoencoder("small", pretrained=pretrained, **options)  # type: ignore[arg-type]


@register_model
def everest_pretrain_vit_base_patch16_224(pretrained: bool = False, **options: object) -> EverestAutoencoder:
    """Autoencoder, ViT-B with a decoder of width 384 and 6 heads."""
    return _autoencoder("base", pretrained=pretrained, **options)  # type: ignore[arg-type]


@register_model
def everest_pretrain_vit_large_patch16_224(pretrained: bool = False, **options: object) -> EverestAutoencoder:
    """Autoencoder, ViT-L with a decoder of width 512 and 8 heads."""
    return _autoencoder("large", pretrained=pretrained, **options)  # type: ignore[arg-type]


@register_model
def everest_pretrain_vit_huge_patch16_224(pretrained: bool = False, **options: object) -> EverestAutoencoder:
    """Autoencoder, ViT-H with a decoder of width 640 and 8 heads."""
    return _autoencoder("huge", pretrained=pretrained, **options)  # type: ignore[arg-type]
