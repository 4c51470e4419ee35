"""A packed batch of clips of several lengths and sizes against each clip alone, under every budget.

Differences of outputs are absolute, those of gradients relative to each parameter's largest; tests print the worst.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from everest_ds.model.autoencoder import CountClips, EverestAutoencoder
from everest_ds.model.budgets import ClipBudget, count_above, share_budget, upper_quantile
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.packing import TokenSet
from everest_ds.model.selection import Selection, SelectionRule
from everest_ds.tokens import ClipCounts, TokenGrid, count_selection, ratio_to_count
from tests.conftest import make_size

ATOL = 1e-5
GRID = TokenGrid(time=8, rows=4, cols=4)
# Frames, height, width and number of clips of each group: 16x224, 24x224 and 8x112 at a seventh of the size.
SHAPES = [(16, 32, 32, 2), (24, 32, 32, 1), (8, 16, 16, 3), (16, 16, 48, 1)]
RULE = SelectionRule(selected_ratio=0.3, visible_ratio=0.1)


def mixed_clips() -> list[torch.Tensor]:
    """Return groups of clips; some hardly move, so that budgets give them different shares."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for frames, height, width, count in SHAPES:
        still = torch.randint(0, 256, (count, 3, 1, height, width), generator=generator).expand(
            -1, -1, frames, -1, -1
        )
        change = torch.randint(-60, 60, (count, 3, frames, height, width), generator=generator)
        strength = torch.rand(count, 1, 1, 1, 1, generator=generator)
        groups.append((still + strength * change).clamp(0, 255).to(torch.uint8))
    return groups


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():  # so that biases and norms matter
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_autoencoder() -> EverestAutoencoder:
    torch.manual_seed(0)
    return randomised(EverestAutoencoder(make_size(), GRID, EncoderOptions(patch_size=8), decoder_depth=2))  # type: ignore[return-value]


def budget_of(grid: TokenGrid) -> ClipBudget:
    return ClipBudget(
        average=count_selection("rero", grid, RULE.selected_ratio, RULE.visible_ratio, "masked"),
        least=ratio_to_count(grid.num_tokens, 0.25),
        most=ratio_to_count(grid.num_tokens, 0.8),
    )


def counts_by(name: str, model: EverestAutoencoder) -> CountClips | None:
    """Return the function by which a budget counts the tokens of a mixed batch, or None for a budget per clip."""
    if name == "clip":
        return None
    budgets = [budget_of(group.grid) for group in model.encoder.group(mixed_clips())]

    def count(importance: list[torch.Tensor], noise: list[torch.Tensor]) -> list[list[ClipCounts]]:
        if name == "batch":
            return share_budget(importance, [group[:, 0] for group in noise], budgets)
        threshold = upper_quantile(importance, budgets)
        return [count_above(group, threshold, b) for group, b in zip(importance, budgets, strict=True)]

    return count  # type: ignore[return-value]


def noise_for(model: EverestAutoencoder) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.rand(len(group), budget_of(group.grid).most, generator=generator)
        for group in model.encoder.group(mixed_clips())
    ]


@pytest.mark.parametrize("budget", ["clip", "batch", "threshold"])
def test_mixed_autoencoder_equals_clip_by_clip(budget: str) -> None:
    model = make_autoencoder()
    single_model = copy.deepcopy(model)
    noise = noise_for(model)
    if budget == "clip":
        noise = [
            n[:, : RULE.noise_length(g.grid)]
            for n, g in zip(noise, model.encoder.group(mixed_clips()), strict=True)
        ]
    output = model(mixed_clips(), noise, RULE, counts_by(budget, model))
    output.loss.backward()
    lengths = output.selection.target.packing.lengths
    shares = [
        length / budget_of(g.grid).average.targets for g, length in zip(_by_clip(model), lengths, strict=True)
    ]
    assert (max(shares) - min(shares) > 0.5) == (budget != "clip")  # otherwise the test would show little
    clips = [clip[None] for group in mixed_clips() for clip in group]
    visible = output.selection.visible.split([1] * len(clips))
    target = output.selection.target.split([1] * len(clips))
    worst = 0.0
    for b, predictions in enumerate(output.prediction_RP.split(lengths)):
        alone = single_model.reconstruct(clips[b], Selection(visible[b], target[b]))
        worst = max(worst, (predictions - alone.prediction_RP).abs().max().item())
        torch.testing.assert_close(predictions, alone.prediction_RP, rtol=0, atol=ATOL)
        # The mean over all target tokens is the mean of the clips' means, weighted by their shares of the tokens.
        (alone.loss * lengths[b] / sum(lengths)).backward()
    print(f"outputs {worst:.1e}, gradients {require_same_gradients(model, single_model):.1e}")


def _by_clip(model: EverestAutoencoder) -> list[object]:
    return [group for group in model.encoder.group(mixed_clips()) for _ in range(len(group))]


def require_same_gradients(model: nn.Module, other: nn.Module) -> float:
    """Compare each gradient relative to its largest value; return the worst difference."""
    worst = 0.0
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        scale = max(q.grad.abs().max().item(), 1e-3)
        worst = max(worst, (p.grad - q.grad).abs().max().item() / scale)
        torch.testing.assert_close(p.grad / scale, q.grad / scale, rtol=0, atol=ATOL, msg=name)
    return worst


@pytest.mark.parametrize("strategy", ["rero", "random", "tube"])
def test_mixed_classifier_pools_each_clip_by_itself(strategy: str) -> None:
    torch.manual_seed(0)
    model = randomised(
        EverestClassifier(
            make_size(),
            GRID,
            EncoderOptions(patch_size=8),
            num_classes=5,
            rule=SelectionRule(selected_ratio=0.4, strategy=strategy),  # type: ignore[arg-type]
            drop_path=0.3,
            head_init_scale=1.0,
        )
    ).train()
    assert isinstance(model, EverestClassifier)
    single_model = copy.deepcopy(model)
    groups = mixed_clips()
    noise = [torch.rand(len(g), model.num_noise(g.grid)) for g in model.group(groups)]
    logits = model(groups, noise)
    logits.square().sum().backward()
    clips = [
        (clip[None], draw[None])
        for group, draws in zip(groups, noise, strict=True)
        for clip, draw in zip(group, draws, strict=True)
    ]
    for row, (clip, draw) in zip(logits, clips, strict=True):
        alone = single_model(clip, draw)
        torch.testing.assert_close(row[None], alone, rtol=0, atol=ATOL)
        alone.square().sum().backward()
    require_same_gradients(model, single_model)
    model.eval()
    one_by_one = torch.cat([model(clip) for clip, _ in clips])
    torch.testing.assert_close(model(groups), one_by_one, rtol=0, atol=ATOL)


def test_positions_are_those_of_each_clips_own_grid() -> None:
    """Clips of other shapes in the batch do not change a clip's positions."""
    model = make_autoencoder()
    groups = mixed_clips()[:2]
    index = TokenSet.from_positions(torch.tensor([[5, 100], [5, 100], [5, 150]]))
    both = model.encoder(model.encoder.group(groups), index)
    for g, part in enumerate(index.split([2, 1])):
        alone = model.encoder(model.encoder.group(groups[g]), part)
        torch.testing.assert_close(both[4 * g : 4 * g + len(alone)], alone, rtol=0, atol=ATOL)
    with pytest.raises(ValueError, match="expected 3 clips in all, got 4"):
        index.split([2, 2])
