"""mmaction2's VideoMAE is read bitwise; models of other projects are recognised and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from everest_ds.cli import main
from everest_ds.errors import UserError
from everest_ds.model.weights.loading import load_weights
from everest_ds.model.weights.reading import read_weights, require_complete
from tests.conftest import GoldenModel

ZERO = torch.zeros(1)
IMAGE, VIDEO = torch.zeros(8, 3, 16, 16), torch.zeros(8, 3, 2, 16, 16)


def mmaction_of(state: dict[str, Tensor], num_tokens: int) -> dict[str, Tensor]:
    """Return a state dict like that of mmaction2's Recognizer3D: backbone, head, positions as a buffer."""
    renamed = {}
    for name, tensor in state.items():
        part, leaf = name.split(".")[0], name.rsplit(".", 1)[1]
        if part == "head":
            renamed[f"cls_head.fc_cls.{leaf}"] = tensor
            continue
        for ours, theirs in (
            ("patch_embed.proj", "patch_embed.projection"),
            ("mlp.fc1", "mlp.layers.0.0"),
            ("mlp.fc2", "mlp.layers.1"),
        ):
            name = name.replace(ours, theirs)
        renamed[f"backbone.{name}"] = tensor
    width = state["fc_norm.weight"].shape[0]
    renamed["backbone.pos_embed"] = sinusoids(num_tokens, width)[None]
    renamed["data_preprocessor.mean"] = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1, 1)
    return renamed


def sinusoids(count: int, width: int) -> Tensor:
    """Return sinusoidal positions by plain numpy, channel by channel."""
    table = np.empty((count, width))
    for channel in range(width):
        angle = np.arange(count) / 10000 ** (2 * (channel // 2) / width)
        table[:, channel] = np.cos(angle) if channel % 2 else np.sin(angle)
    return torch.from_numpy(table).float()


def test_mmaction_file_is_read_bit_for_bit_and_gives_the_same_logits(mini64: GoldenModel, tmp_path: Path) -> None:
    ours = mini64.classifier(0.6).eval()
    content = {"meta": {"epoch": 3}, "state_dict": mmaction_of(ours.state_dict(), mini64.grid.num_tokens)}
    torch.save(content, tmp_path / "mm.pth")
    weights, report = require_complete(read_weights(tmp_path / "mm.pth"))
    assert weights.layout == "mmaction2's"
    assert report.ignored == ("meta", "pos_embed", "data_preprocessor.mean")
    assert f"its positions are fixed sinusoids of {mini64.grid.num_tokens} tokens" in report.notes[0]
    other = mini64.classifier(0.6).eval()
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    load_weights(other, weights, allow=("positions", "num_heads"))
    with torch.no_grad():
        assert torch.equal(other(mini64.clips_BCTHW), ours(mini64.clips_BCTHW))


def test_mmaction_file_is_converted_by_the_command(
    mini64: GoldenModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = mini64.classifier(0.6).state_dict()
    save_file(mmaction_of(state, 1568), tmp_path / "mm.safetensors")
    target = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "mm.safetensors"), str(target), "--to", "everest"]) == 0
    shown = capsys.readouterr().out
    assert "layout mmaction2's" in shown
    assert any(
        line.split() == ["blocks.N.mlp.layers.N.N.weight", "blocks.N.mlp.fc1.weight"] for line in shown.splitlines()
    )
    written = read_weights(target).tensors
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("change", ["trained", "one_token"])
def test_mmaction_model_of_another_kind_is_refused(mini64: GoldenModel, change: str, tmp_path: Path) -> None:
    state = mmaction_of(mini64.classifier(0.6).state_dict(), 8)
    if change == "trained":
        state["backbone.pos_embed"] = torch.randn_like(state["backbone.pos_embed"])
        message = r"its positions \(pos_embed\) are trained"
    else:
        state["backbone.norm.weight"] = state.pop("backbone.fc_norm.weight")
        message = "reads the first token"
    torch.save({"state_dict": state}, tmp_path / "mm.pth")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "mm.pth")


def vit(patch_embed: Tensor, **of_each_block: Tensor) -> dict[str, Tensor]:
    """Return tensors under the names that vision transformers in timm's style have in common."""
    state = {"cls_token": ZERO, "pos_embed": ZERO, "patch_embed.proj.weight": patch_embed, "norm.weight": ZERO}
    for i in range(2):
        for name, tensor in {"attn.qkv.weight": ZERO, "attn.qkv.bias": ZERO, **of_each_block}.items():
            state[f"blocks.{i}.{name}"] = tensor
    return state


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "mae_pretrained": (
        {"model": {**vit(IMAGE), "mask_token": ZERO, "decoder_embed.weight": ZERO, "decoder_blocks.0.x": ZERO}},
        r"is a masked autoencoder of images \(MAE\): its patch embedding is 2-D",
    ),
    "mae_finetuned": (
        {"model": {**vit(IMAGE), "head.weight": ZERO, "fc_norm.weight": ZERO}},
        r"is an image model: its patch embedding patch_embed.proj.weight has shape \(8, 3, 16, 16\)",
    ),
    "timm": (vit(IMAGE), "is an image model"),
    "mmpretrain": ({"state_dict": {"backbone.patch_embed.projection.weight": IMAGE}}, "is an image model"),
    "hf_vit": ({"vit.embeddings.patch_embeddings.projection.weight": IMAGE}, "is an image model"),
    "hf_vit_bare": ({"embeddings.patch_embeddings.projection.weight": IMAGE}, "is an image model"),
    "dinov2": (vit(IMAGE, **{"ls1.gamma": ZERO}), "is an image model of DINOv2's kind"),
    "timesformer": ({"state_dict": vit(IMAGE, **{"temporal_fc.weight": ZERO})}, "is TimeSformer"),
    "clip": ({"visual.conv1.weight": IMAGE, "visual.transformer.resblocks.0.ln_1.weight": ZERO}, "is CLIP"),
    "hf_clip": ({"vision_model.embeddings.patch_embedding.weight": IMAGE}, "is CLIP"),
    "internvideo2": ({"module": vit(VIDEO, **{"ls1.gamma": ZERO})}, "is InternVideo2"),
    "vjepa": (vit(VIDEO), "is V-JEPA or another vision transformer with one bias for queries, keys and values"),
    "mae_st": ({"model": {"pos_embed_temporal": ZERO, "blocks.0.attn.q.weight": ZERO}}, "is MAE-ST"),
    "mvit": ({"state_dict": {"backbone.blocks.0.attn.rel_pos_h": ZERO}}, "is MViT or Hiera"),
    "swin": ({"layers.0.blocks.0.attn.relative_position_bias_table": ZERO}, "is a Swin transformer"),
    "uniformer": ({"blocks1.0.conv1.weight": ZERO, "blocks2.0.conv1.weight": ZERO}, "is UniFormer"),
    "resnet3d": ({"state_dict": {"backbone.layer1.0.conv1.conv.weight": ZERO}}, "is a convolutional network"),
    "nested": (
        {"encoder": {"a": ZERO}, "target_encoder": {"a": ZERO}, "opt": {}},
        "Its parts encoder, target_encoder have tensors: save one of them as its own file",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_model_is_refused_by_what_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = OTHERS[name]
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "w.pth")
    assert main(["convert", str(tmp_path / "w.pth"), str(tmp_path / "out"), "--to", "hf"]) == 2
    said = capsys.readouterr().err
    assert "expected a run, or VideoMAE or EVEREST weights" in said or "expected a state dict" in said


def test_folder_of_another_model_of_hugging_face_is_refused_by_its_type(tmp_path: Path) -> None:
    save_file({"vivit.encoder.layer.0.layernorm_before.weight": ZERO}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vivit"}))
    with pytest.raises(UserError, match="is a Hugging Face model of type 'vivit'; expected a run, or VideoMAE"):
        read_weights(tmp_path)
