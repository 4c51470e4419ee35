"""The classifier in training: drop path with given noise, and a frozen encoder."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.transformer import branch_scales
from everest_ds.model.tubelets import gather_tubelets
from everest_ds.tokens import TokenGrid
from tests.conftest import make_size

GRID = TokenGrid(time=4, rows=4, cols=4)
DEPTH = 3
NUM_CLIPS = 4
# Packed with drop path against clip by clip, float32; measured 8.9e-8 in logits, 9.5e-7 in gradients.
ATOL = 5e-6


def make_classifier(*, drop_path: float = 0.4, checkpointing: bool = False) -> EverestClassifier:
    torch.manual_seed(0)
    options = EncoderOptions(patch_size=8, activation_checkpointing=checkpointing)
    model = EverestClassifier(
        make_size(depth=DEPTH), GRID, options, num_classes=5, drop_path=drop_path, head_init_scale=1.0
    )
    with torch.no_grad():  # so that biases and norms matter
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def clips_and_noise() -> tuple[Tensor, Tensor]:
    """Return clips, and noise that drops some branches of the later blocks and keeps others."""
    generator = torch.Generator().manual_seed(3)
    clips = torch.randint(0, 256, (NUM_CLIPS, 3, 8, 32, 32), dtype=torch.uint8, generator=generator)
    return clips, torch.rand(NUM_CLIPS, 2 * DEPTH, generator=generator)


def plain_logits(model: EverestClassifier, clip_CTHW: Tensor, draws: list[float], drop_path: float) -> Tensor:
    """Return one clip's logits by plain operations on the model's weights; dropped branches are not computed."""
    kept = model.select(*model.group(clip_CTHW[None]))
    pixels = (gather_tubelets(model.group(clip_CTHW[None]), kept).float() / 255).transpose(1, -1)
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    x = F.linear(pixels.transpose(1, -1).flatten(1), model.patch_embed.proj.weight.flatten(1))
    x = x + model.patch_embed.proj.bias + model.positions_ND[kept.position_M]
    width = x.shape[1]
    for number, block in enumerate(model.blocks):
        rate = drop_path * number / (DEPTH - 1)
        if draws[2 * number] >= rate:
            y = F.layer_norm(x, (width,), block.norm1.weight, block.norm1.bias, 1e-6)
            bias = torch.cat((block.attn.q_bias, torch.zeros(width), block.attn.v_bias))
            qkv = F.linear(y, block.attn.qkv.weight, bias)
            heads = []
            for head in qkv.view(len(x), 3, 2, width // 2).permute(2, 1, 0, 3):
                q, k, v = head
                heads.append(torch.softmax(q @ k.T / math.sqrt(width // 2), dim=1) @ v)
            x = x + block.attn.proj(torch.cat(heads, dim=1)) / (1 - rate)
        if draws[2 * number + 1] >= rate:
            y = F.layer_norm(x, (width,), block.norm2.weight, block.norm2.bias, 1e-6)
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(y))) / (1 - rate)
    pooled = F.layer_norm(x.mean(dim=0), (width,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)
    return model.head(pooled)


def gradients(model: EverestClassifier) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_drop_path_equals_clip_by_clip_without_the_dropped_branches() -> None:
    model, (clips, noise) = make_classifier().train(), clips_and_noise()
    dropped = noise.view(NUM_CLIPS, DEPTH, 2) < torch.tensor([0.0, 0.2, 0.4])[:, None]
    assert 3 <= int(dropped.sum()) <= 0.6 * dropped.numel()  # some are dropped and some kept
    logits = model(clips, noise)
    logits.square().sum().backward()
    found = gradients(model)
    model.zero_grad()
    pairs = zip(clips, noise.tolist(), strict=True)
    expected = torch.stack([plain_logits(model, clip, draws, 0.4) for clip, draws in pairs])
    expected.square().sum().backward()
    torch.testing.assert_close(logits, expected, rtol=0, atol=ATOL)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=ATOL, msg=name)
    print(f"logits {(logits - expected).abs().max():.1e}", end=" ")
    print(f"gradients {max((found[n] - g).abs().max() for n, g in gradients(model).items()):.1e}")


def test_drop_path_has_the_official_rates_and_keeps_the_expectation() -> None:
    """With evenly spaced noise the share is exact: a branch of rate p is kept for 1 - p of the draws."""
    noise_BL = ((torch.arange(1000) + 0.5) / 1000)[:, None].expand(-1, 2 * DEPTH)
    scale_BL = branch_scales(noise_BL, 0.4)
    rates = (scale_BL == 0).float().mean(dim=0)
    assert rates.tolist() == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    assert scale_BL.mean(dim=0).tolist() == pytest.approx([1.0] * 2 * DEPTH)
    values = [sorted(set(scale_B.tolist())) for scale_B in scale_BL.T[::2]]
    assert [value for several in values for value in several] == pytest.approx([1, 0, 1.25, 0, 1 / 0.6])


def test_noise_exactly_at_the_rate_keeps_the_branch() -> None:
    assert branch_scales(torch.tensor([[0.0, 0.0, 0.5, 0.4999]]), 0.5).tolist() == [[1.0, 1.0, 2.0, 0.0]]


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_noise_is_ignored_in_evaluation_and_without_drop_path(drop_path: float) -> None:
    model, (clips, noise) = make_classifier(drop_path=drop_path), clips_and_noise()
    plain = make_classifier(drop_path=0.0).train()(clips)
    if drop_path == 0:
        assert model.num_noise(GRID) == 0
        assert torch.equal(model.train()(clips, noise[:, :0]), plain)
    else:
        assert model.num_noise(GRID) == 2 * DEPTH
        assert not torch.allclose(model.train()(clips, noise), plain, atol=1e-3)
    assert torch.equal(model.eval()(clips), plain)
    assert torch.equal(model(clips, noise), plain)


def test_training_without_its_noise_is_refused() -> None:
    model, (clips, noise) = make_classifier().train(), clips_and_noise()
    with pytest.raises(ValueError, match=r"strategy=rero and drop_path=0.4 needs noise \(4, 6\), got none"):
        model(clips)
    for wrong in (noise[:2], noise[:, :5]):
        with pytest.raises(ValueError, match=r"needs noise \(4, 6\), got noise of shape"):
            model(clips, wrong)
    with pytest.raises(ValueError, match=r"drop_path=1.0 must be in \[0, 1\)"):
        make_classifier(drop_path=1.0)


def test_checkpointing_gives_the_same_gradients_under_drop_path() -> None:
    clips, noise = clips_and_noise()
    both = []
    for checkpointing in (False, True):
        model = make_classifier(checkpointing=checkpointing).train()
        model(clips, noise).square().sum().backward()
        both.append(gradients(model))
    assert both[0].keys() == both[1].keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_clip_keeps_its_draws_in_another_batch() -> None:
    model, (clips, noise) = make_classifier().train(), clips_and_noise()
    whole = model(clips, noise)
    halves = torch.cat([model(clips[part], noise[part]) for part in (slice(0, 1), slice(1, 4))])
    torch.testing.assert_close(whole, halves, rtol=0, atol=ATOL)


def test_frozen_encoder_trains_norm_and_head_alone_and_keeps_nothing() -> None:
    model, (clips, _) = make_classifier().train(), clips_and_noise()
    expected = make_classifier().eval()(clips)
    model.freeze_encoder()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert model.num_noise(GRID) == 0  # no drop path
    kept: list[int] = []
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(clips)
    assert torch.equal(logits, expected)
    assert 0 < sum(kept) <= NUM_CLIPS * (2 * 32 + 2)  # input, output, mean and deviation of the norm
    logits.sum().backward()
    assert gradients(model).keys() == trained


def test_pooled_features_are_what_norm_and_head_are_applied_to() -> None:
    model, (clips, _) = make_classifier().eval(), clips_and_noise()
    features = model.pool(clips)
    assert features.shape == (NUM_CLIPS, 32)
    assert torch.equal(model.head(model.fc_norm(features)), model(clips))
    assert torch.equal(model.fc_norm(features), model.forward_features(clips))


def test_branches_of_all_clips_dropped_leave_their_tokens_alone() -> None:
    """If all branches of the later blocks are dropped, the weights of those blocks do not matter."""
    model, (clips, _) = make_classifier().train(), clips_and_noise()
    noise = torch.zeros(NUM_CLIPS, 2 * DEPTH)
    before = model(clips, noise)
    with torch.no_grad():
        for parameter in itertools.chain(model.blocks[1].parameters(), model.blocks[2].parameters()):
            parameter.mul_(-3)
    assert torch.equal(model(clips, noise), before)
