"""Compare with the official implementation: selection, outputs, gradients, training, fine-tuning.

Tolerances belong to the golden set; measured worst cases on a CPU (torch 2.15): importance identical,
encoder 3.9e-6, decoder 3.6e-7, loss 1.2e-7, gradient norms 6e-7 relative, trajectory identical, logits 1.0e-7.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from everest_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD
from everest_ds.model.autoencoder import EverestAutoencoder, Reconstruction
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.packing import TokenSet
from everest_ds.model.selection import Selection, SelectionRule, rank_by_importance, select_rero
from everest_ds.model.tubelets import standardise
from everest_ds.train.step.optim import parameter_groups
from tests.conftest import GoldenModel

pytestmark = pytest.mark.parity

IMPORTANCE_RTOL = 1e-5
# Against float64: a convolution in float32 (1.5e-5 measured), and the exact matmuls of a GPU.
FLOAT64_RTOL = {"cpu": 2e-5, "cuda": 1e-5}
OUTPUT_ATOL = 5e-6
LOSS_ATOL = 2e-6
GRADIENT_RTOL = 1e-4
TRAJECTORY_ATOL = 1e-5
LOGIT_ATOL = 1e-6
# Of a large output the set stores every n-th row.
STORED_EVERY = {"tiny224": {"everest": 16, "videomae": 64}, "mini64": {"everest": 1, "videomae": 4}}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def run_everest(golden: GoldenModel, device: str = "cpu") -> tuple[EverestAutoencoder, Reconstruction]:
    model = golden.autoencoder().to(device)
    noise_BS = golden.outputs["everest.noise"].to(device)
    return model, model(golden.clips_BCTHW.to(device), noise_BS)


def run_tube(golden: GoldenModel) -> tuple[EverestAutoencoder, Reconstruction]:
    hidden_BN = golden.outputs["videomae.mask"]
    selection = Selection(visible=TokenSet.from_mask(~hidden_BN), target=TokenSet.from_mask(hidden_BN))
    model = golden.autoencoder()
    return model, model.reconstruct(golden.clips_BCTHW, selection)


def encoder_output(model: EverestAutoencoder, golden: GoldenModel, selection: Selection) -> Tensor:
    device = model.mask_token.device
    return model.encoder(model.encoder.group(golden.clips_BCTHW.to(device)), selection.visible)


def importance_of(golden: GoldenModel, device: str) -> Tensor:
    model = golden.autoencoder().to(device)
    return model.encoder.rank(*model.encoder.group(golden.clips_BCTHW.to(device))).cpu()


def test_importance_equals_official(golden: GoldenModel) -> None:
    official = golden.outputs["everest.importance"]
    torch.testing.assert_close(importance_of(golden, "cpu"), official, rtol=IMPORTANCE_RTOL, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_importance_equals_float64(golden: GoldenModel, device: str) -> None:
    """The official numbers have rounding errors of 1.5e-5. A GPU rounds less, so it is compared with float64."""
    proj = golden.autoencoder().encoder.patch_embed.proj
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    clips = (golden.clips_BCTHW.double() / 255 - mean) / std
    x_BDTHW = F.conv3d(clips, proj.weight.double(), proj.bias.double(), stride=proj.stride)
    change_BTHW = x_BDTHW.diff(dim=2).norm(dim=1)
    expected = torch.cat((change_BTHW[:, :1], change_BTHW), dim=1).flatten(1)
    found = importance_of(golden, device).double()
    torch.testing.assert_close(found, expected, rtol=FLOAT64_RTOL[device], atol=0)


def test_order_equals_official_including_exact_ties(golden: GoldenModel) -> None:
    order = rank_by_importance(golden.outputs["everest.importance"])
    assert torch.equal(order, golden.outputs["everest.order_stable"].long())


@pytest.mark.parametrize("device", DEVICES)
def test_index_sets_equal_official(golden: GoldenModel, device: str) -> None:
    _, output = run_everest(golden, device)
    num_clips = len(golden.clips_BCTHW)
    visible = output.selection.visible.position_M.view(num_clips, -1).cpu()
    target = output.selection.target.position_M.view(num_clips, -1).cpu()
    assert torch.equal(visible, golden.outputs["everest.input_index"].long())
    assert torch.equal(target, golden.outputs["everest.target_index"].long())


def test_reversed_noise_is_noticed(golden: GoldenModel) -> None:
    """Noise belongs to ranks: in reverse order the index sets differ, so the test above can fail."""
    reversed_noise = golden.outputs["everest.noise"].flip(1)
    importance = golden.outputs["everest.importance"]
    selection = select_rero(importance, reversed_noise, num_visible=golden.num_visible)
    visible = selection.visible.position_M.view(len(importance), -1)
    assert not torch.equal(visible, golden.outputs["everest.input_index"].long())


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_equal_official(golden: GoldenModel, device: str) -> None:
    model, output = run_everest(golden, device)
    encoded = encoder_output(model, golden, output.selection).cpu()
    expected = golden.outputs["everest.encoder_out"].flatten(0, 1)
    torch.testing.assert_close(encoded[: len(expected)], expected, rtol=0, atol=OUTPUT_ATOL)
    check_decoder(golden, output, "everest")
    per_token = (output.prediction_RP - output.target_RP).square().mean(dim=1).cpu()
    expected_loss = golden.outputs["everest.token_loss"].flatten()
    torch.testing.assert_close(per_token, expected_loss, rtol=0, atol=OUTPUT_ATOL)
    assert output.loss.item() == pytest.approx(golden.numbers["everest"]["loss"], abs=LOSS_ATOL)


def test_tube_masked_outputs_equal_official(golden: GoldenModel) -> None:
    model, output = run_tube(golden)
    encoded = encoder_output(model, golden, output.selection)
    expected = golden.outputs["videomae.encoder_out"].flatten(0, 1)
    torch.testing.assert_close(encoded[: len(expected)], expected, rtol=0, atol=OUTPUT_ATOL)
    check_decoder(golden, output, "videomae")
    assert output.loss.item() == pytest.approx(golden.numbers["videomae"]["loss"], abs=LOSS_ATOL)


def test_targets_equal_official() -> None:
    golden = GoldenModel("tiny224")
    _, output = run_everest(golden)
    stored = golden.outputs["everest.target"][0]
    per_clip = len(output.target_RP) // len(golden.clips_BCTHW)
    rows = output.target_RP[:per_clip:16]
    torch.testing.assert_close(rows, stored, rtol=0, atol=OUTPUT_ATOL)


def test_embedding_equals_official() -> None:
    golden = GoldenModel("tiny224")
    model = golden.autoencoder()
    embedded = model.encoder.patch_embed(standardise(golden.clips_BCTHW[:1]))
    torch.testing.assert_close(embedded[:, :64], golden.outputs["everest.patch_embed"], rtol=0, atol=OUTPUT_ATOL)


def check_decoder(golden: GoldenModel, output: Reconstruction, kind: str) -> None:
    stored = golden.outputs[f"{kind}.decoder_out"]
    per_clip = len(output.prediction_RP) // len(golden.clips_BCTHW)
    prediction = output.prediction_RP.view(len(golden.clips_BCTHW), per_clip, -1)
    rows = prediction[: len(stored), :: STORED_EVERY[golden.tag][kind]].cpu()
    torch.testing.assert_close(rows, stored, rtol=0, atol=OUTPUT_ATOL)
    norms = golden.outputs[f"{kind}.decoder_out_rownorm"]
    torch.testing.assert_close(prediction.norm(dim=-1).cpu(), norms, rtol=OUTPUT_ATOL, atol=OUTPUT_ATOL)


def gradient_norms(model: EverestAutoencoder, output: Reconstruction) -> dict[str, float]:
    output.loss.backward()
    return {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_norms_equal_official(golden: GoldenModel, device: str) -> None:
    model, output = run_everest(golden, device)
    expected = golden.numbers["everest"]["grad_norms"]
    assert gradient_norms(model, output) == pytest.approx(expected, rel=GRADIENT_RTOL)


def test_gradient_norms_of_tube_masking_equal_official(mini64: GoldenModel) -> None:
    model, output = run_tube(mini64)
    expected = mini64.numbers["videomae"]["grad_norms"]
    assert gradient_norms(model, output) == pytest.approx(expected, rel=GRADIENT_RTOL)


def test_adamw_trajectory_equals_official(mini64: GoldenModel) -> None:
    trajectory = mini64.numbers["traj_pretrain"]
    model = mini64.autoencoder()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for lr, noise_BS in zip(trajectory["lr"], mini64.outputs["traj.noise"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model(mini64.clips_BCTHW, noise_BS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(trajectory["losses"], abs=TRAJECTORY_ATOL)


@pytest.mark.parametrize(("kind", "keep_ratio"), [("finetune_everest", 0.6), ("finetune_full", 1.0)])
def test_classifier_logits_equal_official(mini64: GoldenModel, kind: str, keep_ratio: float) -> None:
    model = mini64.classifier(keep_ratio)
    logits = model(mini64.clips_BCTHW)
    torch.testing.assert_close(logits, mini64.outputs[f"{kind}.logits"], rtol=0, atol=LOGIT_ATOL)
    if keep_ratio < 1:
        kept = model.select(*model.group(mini64.clips_BCTHW))
        expected = mini64.outputs["finetune_everest.kept_index"].long()
        assert torch.equal(kept.position_M.view(expected.shape), expected)


@pytest.mark.parametrize(("kind", "keep_ratio"), [("finetune_everest", 0.6), ("finetune_full", 1.0)])
def test_classifier_logits_equal_official_over_1568_tokens(
    whole_golden_set: Path, kind: str, keep_ratio: float
) -> None:
    """Measured: 8.9e-8 with the kept tokens, 7.5e-8 with all."""
    golden = GoldenModel("tiny224")
    weights = load_file(whole_golden_set / "tiny224_weights.safetensors")
    outputs = load_file(whole_golden_set / "tiny224_outputs.safetensors")
    clips_BCTHW = torch.from_numpy(np.load(whole_golden_set / "tiny224_clips_u8.npz")["clips"])
    rule = SelectionRule(selected_ratio=keep_ratio)
    model = EverestClassifier(golden.size, golden.grid, num_classes=7, rule=rule)
    model.load_state_dict({k.removeprefix("finetune."): v for k, v in weights.items() if k.startswith("finetune.")})
    torch.testing.assert_close(model(clips_BCTHW), outputs[f"{kind}.logits"], rtol=0, atol=LOGIT_ATOL)
    if keep_ratio < 1:
        kept = model.select(*model.group(clips_BCTHW))
        assert torch.equal(kept.position_M.view(2, -1), outputs["finetune_everest.kept_index"].long())
