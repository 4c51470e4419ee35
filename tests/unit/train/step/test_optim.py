from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

import everest_ds.model.registry  # noqa: F401  (registers the models)
from everest_ds.config import BatchConfig, OptimConfig
from everest_ds.train.engine import set_learning_rate
from everest_ds.train.step.optim import (
    describe_groups,
    learning_rate,
    make_optimizer,
    parameter_groups,
    require_scaled_rates,
)
from tests.conftest import GoldenModel

SCHEDULE_RTOL = 1e-12


def test_groups_are_the_official_ones(golden_json: Callable[[str], Any]) -> None:
    with torch.device("meta"):
        model = timm.create_model("everest_pretrain_vit_base_patch16_224")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    official = golden_json("optim_schedule")["pretrain_vit_base"]
    for group, key in zip(parameter_groups(model, 0.05), ("no_decay", "decay"), strict=True):
        assert group["weight_decay"] == official[key]["weight_decay"]
        assert sorted(names[id(p)] for p in group["params"]) == sorted(official[key]["params"])


def test_mask_token_of_a_wrapped_model_has_no_decay(mini64: GoldenModel) -> None:
    wrapped = torch.nn.ModuleDict({"model": mini64.autoencoder()})
    no_decay, _ = parameter_groups(wrapped, 0.05)
    assert any(p is wrapped["model"].mask_token for p in no_decay["params"])


def test_frozen_parameters_are_in_no_group(mini64: GoldenModel) -> None:
    model = mini64.autoencoder()
    model.encoder.requires_grad_(False)
    grouped = [p for group in parameter_groups(model, 0.05) for p in group["params"]]
    assert len(grouped) == sum(p.requires_grad for p in model.parameters())


def finetune_vit_base() -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model("everest_vit_base_patch16_224", num_classes=400)


@pytest.mark.parametrize("wrapped", [False, True], ids=["classifier", "task"])
@pytest.mark.parametrize("layer_decay", [0.75, 0.9])
def test_layer_decayed_groups_are_the_official_ones(
    layer_decay: float, wrapped: bool, golden_json: Callable[[str], Any]
) -> None:
    """Scales, weight decays and members are equal; `wrapped` adds the prefix `model.` of a task's names."""
    official = golden_json("optim_schedule")["finetune_vit_base_layer_decay"][str(layer_decay)]
    model = finetune_vit_base()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    outer = torch.nn.ModuleDict({"model": model}) if wrapped else model
    groups = parameter_groups(outer, 0.05, layer_decay)
    found = {(g["lr_scale"], g["weight_decay"]): sorted(names[id(p)] for p in g["params"]) for g in groups}
    expected = {(g["lr_scale"], g["weight_decay"]): sorted(g["params"]) for g in official.values()}
    assert len(groups) == len(found) == 28
    assert found == expected
    assert [g["lr_scale"] for g in groups] == sorted((g["lr_scale"] for g in groups), reverse=True)
    assert groups[0]["lr_scale"] == 1.0


def test_groups_without_layer_decay_are_the_official_ones(golden_json: Callable[[str], Any]) -> None:
    official = golden_json("optim_schedule")["finetune_vit_base_no_layer_decay"]
    found = describe_groups(parameter_groups(finetune_vit_base(), 0.05))
    for group, key in zip(found, ("no_decay", "decay"), strict=True):
        assert group["num_tensors"] == official[key]["n_params"]
        assert (group["lr_scale"], group["weight_decay"]) == (1.0, official[key]["weight_decay"])


@pytest.mark.parametrize(("depth", "decay"), [(12, 0.75), (24, 0.75), (32, 0.75), (12, 0.7)])
def test_scales_of_every_depth_are_the_official_ones(
    depth: int, decay: float, golden_json: Callable[[str], Any]
) -> None:
    official = golden_json("optim_schedule")["layer_decay_values_depth"][f"depth{depth}_decay{decay}"]
    blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(depth))
    parts = {"patch_embed": torch.nn.Linear(1, 1), "blocks": blocks, "head": torch.nn.Linear(1, 1)}
    groups = parameter_groups(torch.nn.ModuleDict(parts), 0.05, decay)
    assert sorted({group["lr_scale"] for group in groups}) == official


def test_frozen_layers_leave_no_empty_group() -> None:
    model = finetune_vit_base()
    model.freeze_encoder()
    assert describe_groups(parameter_groups(model, 0.05, 0.75)) == [
        {"lr_scale": 1.0, "weight_decay": 0.0, "num_tensors": 3, "num_parameters": 2 * 768 + 400},
        {"lr_scale": 1.0, "weight_decay": 0.05, "num_tensors": 1, "num_parameters": 768 * 400},
    ]
    assert len(parameter_groups(model, 0.0, 0.75)) == 1  # without weight decay all are equal


def test_layer_decay_of_an_autoencoder_is_refused(mini64: GoldenModel) -> None:
    with pytest.raises(ValueError, match=r"layer_decay=0\.75 needs a model with blocks\.0"):
        parameter_groups(mini64.autoencoder(), 0.05, 0.75)


def test_each_group_learns_at_its_own_scale(mini64: GoldenModel) -> None:
    """Checks the rule on torch's own optimiser at several steps of a schedule."""
    groups = parameter_groups(mini64.classifier(0.6), 0.05, 0.5)
    optimizer = make_optimizer(groups, OptimConfig())
    config = OptimConfig(warmup_epochs=1, epochs=3)
    for step in range(0, 30, 7):
        rate = learning_rate(step, config, BatchConfig(global_size=256), 10)
        set_learning_rate(SimpleNamespace(optimizer=optimizer), rate)
        require_scaled_rates(optimizer.param_groups, rate)
        assert {g["lr"] / g["lr_scale"] for g in optimizer.param_groups} == {rate}
    optimizer.param_groups[1]["lr"] *= 1.001
    with pytest.raises(ValueError, match="parameter group 1 has learning rate"):
        require_scaled_rates(optimizer.param_groups, rate)


def test_schedule_equals_official(golden_json: Callable[[str], Any]) -> None:
    cases = golden_json("optim_schedule")["cosine_scheduler"]
    checked = 0
    for case in cases:
        if case["warmup_steps"] > 0:
            continue  # only the official code can give the warm-up in steps
        config = OptimConfig(
            base_lr=case["base"], min_lr=case["final"], epochs=case["epochs"], warmup_epochs=case["warmup_epochs"]
        )
        steps = range(case["epochs"] * case["niter_per_epoch"])
        rates = [learning_rate(s, config, BatchConfig(global_size=256), case["niter_per_epoch"]) for s in steps]
        assert rates == pytest.approx(case["values"], rel=SCHEDULE_RTOL, abs=1e-18)
        checked += 1
    assert checked >= 2


def test_long_schedule_equals_official(golden_json: Callable[[str], Any]) -> None:
    case = golden_json("optim_schedule")["cosine_scheduler_long"]
    # UCF101: base 1e-3 at batch 192, minimum 1e-5.
    config = OptimConfig(base_lr=1e-3, min_lr=1e-5, epochs=case["epochs"], warmup_epochs=case["warmup_epochs"])
    assert len(case["samples"]) > 20
    for step, expected in case["samples"].items():
        rate = learning_rate(int(step), config, BatchConfig(global_size=192), case["niter"])
        assert rate == pytest.approx(expected, rel=1e-9)


def test_rates_scale_with_the_global_batch() -> None:
    config = OptimConfig(base_lr=1e-3, warmup_epochs=1, epochs=4)
    for step in range(40):
        small = learning_rate(step, config, BatchConfig(global_size=256), 10)
        assert learning_rate(step, config, BatchConfig(global_size=1024), 10) == pytest.approx(4 * small)


def test_warmup_starts_at_warmup_lr_and_reaches_the_peak() -> None:
    batch, config = (
        BatchConfig(global_size=256),
        OptimConfig(base_lr=1e-3, warmup_epochs=2, epochs=4, warmup_lr=1e-4),
    )
    rates = [learning_rate(step, config, batch, 5) for step in range(20)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    without = replace(config, warmup_epochs=0)
    assert learning_rate(0, without, batch, 5) == pytest.approx(1e-3)


def test_optimizer_has_the_configured_terms(mini64: GoldenModel) -> None:
    groups = parameter_groups(mini64.autoencoder(), 0.05)
    optimizer = make_optimizer(groups, OptimConfig(betas=(0.8, 0.9), eps=1e-6))
    assert [(g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ((0.8, 0.9), 1e-6, 0.0),
        ((0.8, 0.9), 1e-6, 0.05),
    ]
