"""Arrays for pictures of a model and a clip show the selection and predictions of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from einops import rearrange

from everest_ds.model.autoencoder import EverestAutoencoder, Reconstruction
from everest_ds.model.classifier import EverestClassifier, fixed_draws
from everest_ds.model.selection import Selection, SelectionRule
from everest_ds.model.tubelets import reconstruction_target, unstandardise
from everest_ds.pictures.examine import choose_frames, examine
from everest_ds.tokens import StrategyName, TokenGrid
from tests.conftest import make_size

GRID = TokenGrid(time=4, rows=2, cols=4)
STRATEGIES: list[tuple[StrategyName, float]] = [
    ("rero", 0.3), ("random", 0.3), ("tube", 0.5), ("running_cell", 0.5), ("all", 1.0)
]  # fmt: skip


@pytest.fixture
def clip_CTHW() -> torch.Tensor:
    return torch.randint(0, 256, (3, 8, 32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> EverestAutoencoder:
    torch.manual_seed(0)
    return EverestAutoencoder(make_size(), GRID, decoder_depth=1).eval()


@pytest.mark.parametrize(("strategy", "ratio"), STRATEGIES)
def test_tokens_and_loss_are_those_of_a_forward_pass(
    strategy: StrategyName, ratio: float, model: EverestAutoencoder, clip_CTHW: torch.Tensor
) -> None:
    rule = SelectionRule(strategy=strategy, selected_ratio=ratio, visible_ratio=0.25)
    state = torch.get_rng_state()
    picture = examine(model, clip_CTHW, [("own", rule)], predicts=True, reconstructs=True)
    assert torch.equal(state, torch.get_rng_state())
    noise_BS = fixed_draws(rule.noise_length(GRID))[None]
    expected = model(clip_CTHW[None], noise_BS, rule)
    (choice,) = picture.choices
    assert choice.visible_S.tolist() == expected.selection.visible.position_M.tolist()
    assert choice.predicted_R.tolist() == expected.selection.target.position_M.tolist()
    assert choice.loss == float(expected.loss.detach())
    assert picture.importance_N is not None
    (group,) = model.encoder.group(clip_CTHW[None])
    assert picture.importance_N.tolist() == model.encoder.rank(group)[0].tolist()


def test_predicted_pixels_undo_the_target() -> None:
    tubelets = torch.randint(0, 256, (5, 3, 2, 16, 16), dtype=torch.uint8)
    pixels = unstandardise(reconstruction_target(tubelets), tubelets)
    assert (pixels * 255 - tubelets).abs().max() < 1e-3  # measured: 4.6e-5


def test_reconstruction_of_a_perfect_model_is_the_clip_and_only_predicted_tokens_change(
    model: EverestAutoencoder, clip_CTHW: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = SelectionRule(selected_ratio=0.5, visible_ratio=0.25)

    def drawn(factor: float) -> tuple[np.ndarray, np.ndarray]:
        real = type(model).reconstruct

        def reconstruct(self: EverestAutoencoder, clips: torch.Tensor, selection: Selection) -> Reconstruction:
            output = real(self, clips, selection)
            return output._replace(prediction_RP=factor * output.target_RP)

        with monkeypatch.context() as patch:
            patch.setattr(EverestAutoencoder, "reconstruct", reconstruct)
            (choice,) = examine(model, clip_CTHW, [("own", rule)], predicts=True, reconstructs=True).choices
        assert choice.reconstruction_THWC is not None
        return choice.reconstruction_THWC, choice.predicted_R

    frames = rearrange(clip_CTHW, "c t h w -> t h w c").numpy()
    perfect, _ = drawn(1.0)
    assert np.array_equal(perfect, frames)
    flat, predicted = drawn(0.0)
    for n, (t, r, c) in enumerate(np.ndindex(GRID.time, GRID.rows, GRID.cols)):
        part = (slice(2 * t, 2 * t + 2), slice(16 * r, 16 * r + 16), slice(16 * c, 16 * c + 16))
        if n in predicted:  # mean of each channel over the tubelet
            assert np.abs(flat[part] - frames[part].mean(axis=(0, 1, 2))).max() <= 0.5 + 1e-3
        else:
            assert np.array_equal(flat[part], frames[part])


def test_classifier_sees_what_it_keeps(clip_CTHW: torch.Tensor) -> None:
    rule = SelectionRule(selected_ratio=0.6)
    model = EverestClassifier(make_size(), GRID, num_classes=3, rule=rule).eval()
    (choice,) = examine(model, clip_CTHW, [("own", rule)], predicts=False).choices
    kept = model.select(model.group(clip_CTHW[None])[0])
    assert choice.visible_S.tolist() == kept.position_M.tolist()
    assert len(choice.predicted_R) == 0 and choice.reconstruction_THWC is None


def test_chosen_frames_are_those_of_a_forward_pass(model: EverestAutoencoder, clip_CTHW: torch.Tensor) -> None:
    rule = SelectionRule(num_steps=3)
    chosen_CTHW, choice = choose_frames(model, clip_CTHW, rule, 3)
    grid = TokenGrid(time=3, rows=2, cols=4)
    noise_BS = torch.cat([torch.zeros(rule.noise_length(grid)), fixed_draws(4)])[None]
    assert model(clip_CTHW[None], noise_BS, rule).frames[0].steps_BT.tolist() == choice.steps_BT.tolist()
    frames = [2 * step + i for step in choice.steps_BT[0].tolist() for i in range(2)]
    assert torch.equal(chosen_CTHW, clip_CTHW[:, frames])
