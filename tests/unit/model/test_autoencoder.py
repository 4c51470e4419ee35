from __future__ import annotations

import copy

import pytest
import torch

from everest_ds.errors import UserError
from everest_ds.model.attention import BACKENDS
from everest_ds.model.autoencoder import EverestAutoencoder, interleave_clips
from everest_ds.model.classifier import EverestClassifier, mean_per_clip
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.packing import TokenSet
from everest_ds.model.selection import DEFAULT_RULE, Selection, SelectionRule
from everest_ds.tokens import TokenGrid
from tests.conftest import make_size

# Packed against clip by clip, float32; measured 1.7e-6 in outputs, 1.1e-6 in gradients.
PACKED_ATOL = 1e-5
GRID = TokenGrid(time=4, rows=4, cols=4)


def make_autoencoder(*, checkpointing: bool = False, attention: str = "auto") -> EverestAutoencoder:
    torch.manual_seed(0)
    options = EncoderOptions(patch_size=8, activation_checkpointing=checkpointing, attention=attention)
    model = EverestAutoencoder(make_size(), GRID, options, decoder_depth=2)
    with torch.no_grad():  # so that biases and norms matter
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def random_clips(batch: int, size: int = 32, frames: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, 3, frames, size, size), dtype=torch.uint8, generator=generator)


def random_selection(visible_counts: list[int], target_counts: list[int], num_tokens: int = 64) -> Selection:
    """Return a selection of disjoint visible and target tokens of the given lengths."""
    generator = torch.Generator().manual_seed(sum(visible_counts))
    visible = torch.zeros(len(visible_counts), num_tokens, dtype=torch.bool)
    target = torch.zeros_like(visible)
    for b, (v, t) in enumerate(zip(visible_counts, target_counts, strict=True)):
        order = torch.randperm(num_tokens, generator=generator)
        visible[b, order[:v]] = True
        target[b, order[v : v + t]] = True
    return Selection(visible=TokenSet.from_mask(visible), target=TokenSet.from_mask(target))


def clip_of(selection: Selection, b: int) -> Selection:
    """Return the part of a selection that belongs to one clip."""

    def part(index: TokenSet) -> TokenSet:
        mask = torch.zeros(1, 64, dtype=torch.bool)
        mask[0, index.position_M[index.clip_M == b]] = True
        return TokenSet.from_mask(mask)

    return Selection(visible=part(selection.visible), target=part(selection.target))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("visible", "target"),
    [([7, 7, 7], [9, 9, 9]), ([3, 12, 1, 30], [5, 2, 40, 1]), ([1, 6], [20, 1]), ([5, 8], [4, 4])],
)
def test_packed_equals_clip_by_clip_forward_and_gradients(
    visible: list[int], target: list[int], device: str
) -> None:
    packed_model = make_autoencoder().to(device)
    single_model = copy.deepcopy(packed_model)
    clips = random_clips(len(visible)).to(device)
    selection = random_selection(visible, target)
    moved = Selection(
        visible=_to(selection.visible, device),
        target=_to(selection.target, device),
    )
    packed = packed_model.reconstruct(clips, moved)
    encoded = packed_model.encoder(packed_model.encoder.group(clips), moved.visible)
    (packed.prediction_RP - packed.target_RP).square().sum().backward()
    for b, (tokens, predictions, targets) in enumerate(
        zip(encoded.split(visible), packed.prediction_RP.split(target), packed.target_RP.split(target), strict=True)
    ):
        alone = clip_of(selection, b)
        alone = Selection(visible=_to(alone.visible, device), target=_to(alone.target, device))
        single = single_model.reconstruct(clips[b : b + 1], alone)
        assert torch.equal(single.target_RP, targets)
        torch.testing.assert_close(predictions, single.prediction_RP, rtol=0, atol=PACKED_ATOL)
        encoded_alone = single_model.encoder(single_model.encoder.group(clips[b : b + 1]), alone.visible)
        torch.testing.assert_close(tokens, encoded_alone, rtol=0, atol=PACKED_ATOL)
        (single.prediction_RP - single.target_RP).square().sum().backward()
    for (name, p), q in zip(packed_model.named_parameters(), single_model.parameters(), strict=True):
        scale = q.grad.abs().max().item()  # type: ignore[union-attr]
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=PACKED_ATOL * max(scale, 1.0), msg=name)


def _to(index: TokenSet, device: str) -> TokenSet:
    packing = index.packing
    moved = type(packing)(packing.lengths, packing.cu_seqlens.to(device))
    return TokenSet(index.position_M.to(device), index.clip_M.to(device), moved)


# Packed against clip by clip in bfloat16, two blocks deep; outputs are of order 1.
BFLOAT16_ATOL = 5e-2


@pytest.mark.gpu
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_packed_equals_clip_by_clip_in_bfloat16_with_every_backend(backend: str) -> None:
    obstacle = BACKENDS[backend].obstacle(torch.device("cuda"), torch.bfloat16, 16)
    if obstacle:
        pytest.skip(obstacle)
    model = make_autoencoder(attention=backend).to("cuda").bfloat16()
    visible, target = [3, 12, 1, 30], [5, 2, 40, 1]
    clips, selection = random_clips(4).to("cuda"), random_selection(visible, target)
    packed = model.reconstruct(clips, Selection(_to(selection.visible, "cuda"), _to(selection.target, "cuda")))
    for b, predictions in enumerate(packed.prediction_RP.split(target)):
        alone = clip_of(selection, b)
        alone = Selection(visible=_to(alone.visible, "cuda"), target=_to(alone.target, "cuda"))
        single = model.reconstruct(clips[b : b + 1], alone)
        torch.testing.assert_close(predictions, single.prediction_RP, rtol=0, atol=BFLOAT16_ATOL)


def test_interleaving_puts_each_clips_tokens_side_by_side() -> None:
    selection = random_selection([2, 0, 3], [1, 4, 2])
    visible = torch.arange(5.0)[:, None] + 100
    target = torch.arange(7.0)[:, None] + 200
    x_MD, packing, target_rows = interleave_clips(visible, target, selection)
    expected = [100, 101, 200, 201, 202, 203, 204, 102, 103, 104, 205, 206]
    assert x_MD.flatten().tolist() == expected
    assert packing.lengths == (3, 4, 5)
    assert x_MD[target_rows].flatten().tolist() == target.flatten().tolist()


def test_checkpointing_changes_no_number() -> None:
    clips, noise = random_clips(2), torch.rand(2, 19)
    grads = []
    for checkpointing in (False, True):
        model = make_autoencoder(checkpointing=checkpointing)
        model(clips, noise).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_ranking_leaves_no_gradient_and_visible_tokens_do() -> None:
    model = make_autoencoder()
    importance = model.encoder.rank(*model.encoder.group(random_clips(2)))
    assert importance.dtype == torch.float32
    assert not importance.requires_grad
    model(random_clips(2), torch.rand(2, 19)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_ranking_in_chunks_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clips = make_autoencoder(), random_clips(5)
    whole = model.encoder.rank(*model.encoder.group(clips))
    monkeypatch.setattr("everest_ds.model.encoder.RANKING_CHUNK", 2 * clips[0].numel())
    torch.testing.assert_close(model.encoder.rank(*model.encoder.group(clips)), whole, rtol=1e-6, atol=0)


def test_other_frames_and_sizes_run_with_interpolated_positions() -> None:
    model = make_autoencoder()
    for frames, size in ((16, 32), (4, 48), (8, 16)):
        clips = random_clips(2, size=size, frames=frames)
        (group,) = model.encoder.group(clips)
        output = model(clips, torch.rand(2, DEFAULT_RULE.noise_length(group.grid)))
        assert torch.isfinite(output.loss)
    with pytest.raises(UserError, match="num_frames=7"):
        model(random_clips(1, frames=7), torch.rand(1, 4))


def test_bfloat16_weights_still_rank_in_float32() -> None:
    model = make_autoencoder().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        importance = model.encoder.rank(*model.encoder.group(random_clips(2)))
    float32 = copy.deepcopy(model).float().encoder
    exact = float32.rank(*float32.group(random_clips(2)))
    assert torch.equal(importance, exact)


def test_a_bias_of_the_key_would_change_nothing() -> None:
    """The key has no bias: it would shift all scores of a query equally, which softmax ignores."""
    model, clips = make_autoencoder().double(), random_clips(1)
    selection = random_selection([9], [3])
    before = model.encoder(model.encoder.group(clips), selection.visible)
    block = model.encoder.blocks[0].attn
    width = block.q_bias.numel()
    block.qkv.register_forward_hook(
        lambda module, args, out: out + torch.cat([torch.zeros(width), torch.ones(width), torch.zeros(width)])
    )
    torch.testing.assert_close(model.encoder(model.encoder.group(clips), selection.visible), before)


def test_classifier_pools_each_clip_over_its_own_tokens() -> None:
    index = TokenSet.from_mask(torch.tensor([[True, True, False], [False, False, True]]))
    pooled = mean_per_clip(torch.tensor([[1.0], [3.0], [7.0]]), index)
    assert pooled.tolist() == [[2.0], [7.0]]
    empty = TokenSet.from_mask(torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match="without tokens"):
        mean_per_clip(torch.zeros(1, 1), empty)


@pytest.mark.parametrize("counts", [[900, 900], [900, 100]], ids=["equal", "unequal"])
def test_mean_of_many_bfloat16_tokens_is_as_exact_as_one(counts: list[int]) -> None:
    """A bfloat16 sum of 900 tokens of about 1 would not grow beyond 256."""
    index = TokenSet.from_mask(torch.arange(900) < torch.tensor(counts)[:, None])
    x_MD = (1 + 0.1 * torch.rand(sum(counts), 3)).to(torch.bfloat16)
    expected = torch.stack([part.double().mean(dim=0) for part in x_MD.split(counts)])
    assert torch.equal(mean_per_clip(x_MD, index), expected.to(torch.bfloat16))


def test_classifier_keeps_the_share_that_it_was_told() -> None:
    torch.manual_seed(0)
    clips = random_clips(3)
    for ratio, count in ((0.6, 38), (1.0, 64)):
        rule = SelectionRule(selected_ratio=ratio)
        model = EverestClassifier(make_size(), GRID, EncoderOptions(patch_size=8), num_classes=5, rule=rule)
        assert model.select(*model.group(clips)).packing.lengths == (count,) * 3
        assert model(clips).shape == (3, 5)
