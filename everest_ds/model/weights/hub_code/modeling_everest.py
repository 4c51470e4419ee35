"""The classifier of an EVEREST run for transformers: its encoder sees only the tokens that the run kept.

`everest convert --to hf` copies this file into the folder that it writes. It needs only torch and transformers, and
is run by `AutoModelForVideoClassification.from_pretrained(FOLDER, trust_remote_code=True)`. Without
`trust_remote_code`, transformers uses its own VideoMAE with the same weights, on all tokens.

The settings are in `config.everest` of config.json. Axes: B clips, T frames, C channels, H W pixels, N tokens of a
clip, S kept tokens, D width.
"""

import contextlib
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.models.videomae.modeling_videomae import VideoMAEEmbeddings, get_sinusoid_encoding_table


class EverestEmbeddings(VideoMAEEmbeddings):
    """Embeddings of the tokens that are kept of each clip; the others are dropped before the first block."""

    def __init__(self, config: transformers.VideoMAEConfig) -> None:
        super().__init__(config)
        grid, trained = config.everest["grid"], config.everest["position_grid"]
        if grid != trained:  # positions of another clip size, resampled over time, rows and columns
            table_1ND = get_sinusoid_encoding_table(trained[0] * trained[1] * trained[2], config.hidden_size)
            volume_1DTHW = table_1ND.reshape(1, *trained, -1).movedim(-1, 1)
            resized_1DTHW = F.interpolate(volume_1DTHW, size=grid, mode="trilinear", align_corners=False)
            self.position_embeddings = resized_1DTHW.flatten(2).transpose(1, 2)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Embed standardised clips (B, T, C, H, W) into (B, S, D); a given mask replaces the selection."""
        if bool_masked_pos is None:
            bool_masked_pos = self.hidden_tokens(pixel_values)
        return super().forward(pixel_values, bool_masked_pos)

    @torch.no_grad()
    def hidden_tokens(self, pixel_values: Tensor) -> Tensor | None:
        """Return which tokens are dropped, (B, N) bool, equally many of each clip; None if all are kept.

        Raises:
            ValueError: The clips have another length than the model's.
        """
        settings, num_clips = self.config.everest, len(pixel_values)
        if settings["num_kept"] == self.num_patches:
            return None
        if pixel_values.shape[1] != self.config.num_frames:
            raise ValueError(f"expected clips of {self.config.num_frames} frames, got {pixel_values.shape[1]}")
        if settings["kept_tokens"] is None:
            descending = settings["order"] == "descending"
            ranked_BN = torch.argsort(self._change(pixel_values), dim=1, descending=descending, stable=True)
            kept_BS = ranked_BN[:, : settings["num_kept"]]
        else:
            kept_S = torch.tensor(settings["kept_tokens"], device=pixel_values.device)
            kept_BS = kept_S.expand(num_clips, -1)
        hidden_BN = torch.ones(num_clips, self.num_patches, dtype=torch.bool, device=pixel_values.device)
        return hidden_BN.scatter(1, kept_BS, False)

    def _change(self, pixel_values: Tensor) -> Tensor:
        """Return each token's distance from the token at the same place one time step earlier, (B, N) float32.

        The first time step has no predecessor; it gets the values of the second.
        """
        projection = self.patch_embeddings.projection
        clips_BCTHW = pixel_values.transpose(1, 2).float().contiguous()
        with _full_float32(clips_BCTHW.device.type):
            weight, bias = projection.weight.float(), projection.bias
            assert bias is not None
            x_BDTHW = F.conv3d(clips_BCTHW, weight, bias.float(), stride=projection.stride)
            # A view, as in everest_ds: another memory layout rounds differently, which changes near ties.
            x_BTJD = x_BDTHW.flatten(3).permute(0, 2, 3, 1)
            change_BTJ = DISTANCES[self.config.everest["distance"]](x_BTJD[:, 1:], x_BTJD[:, :-1])
        return torch.cat((change_BTJ[:, :1], change_BTJ), dim=1).flatten(1)


class VideoMAEForVideoClassification(transformers.VideoMAEForVideoClassification):
    """Transformers' classifier with the run's selection and the run's epsilon in the last norm.

    It has its parent's name because `pipeline` and the conversion of weights depend on names.
    """

    def __init__(self, config: transformers.VideoMAEConfig) -> None:
        super().__init__(config)
        self.videomae.embeddings = EverestEmbeddings(config)
        assert self.fc_norm is not None  # use_mean_pooling is set
        self.fc_norm.eps = config.everest["last_norm_eps"]
        self.post_init()


def _l2(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x - y, dim=-1)


def _l1(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x - y, ord=1, dim=-1)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return -F.cosine_similarity(x, y, dim=-1)


def _cka(x: Tensor, y: Tensor) -> Tensor:
    x, y = (z - z.mean(dim=-1, keepdim=True) for z in (x, y))
    return -F.cosine_similarity(x, y, dim=-1).square()


DISTANCES = {"l2": _l2, "l1": _l1, "cosine": _cosine, "cka": _cka}


@contextlib.contextmanager
def _full_float32(device_type: str) -> Iterator[None]:
    """Compute in true float32: no autocast, no TF32 convolutions. Half precision would select other tokens."""
    settings = torch.backends.cudnn
    holder, name = (settings.conv, "fp32_precision") if hasattr(settings, "conv") else (settings, "allow_tf32")
    before = getattr(holder, name)
    setattr(holder, name, "ieee" if name == "fp32_precision" else False)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        setattr(holder, name, before)
