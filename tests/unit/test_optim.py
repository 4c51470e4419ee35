from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch

import everest_ds.model.registry  # noqa: F401  (registers the models)
from everest_ds.config import BatchConfig, OptimConfig
from everest_ds.train.optim import learning_rate, make_optimizer, parameter_groups
from tests.conftest import GoldenModel

SCHEDULE_RTOL = 1e-12


def test_groups_are_the_official_ones(golden_json: Callable[[str], Any]) -> None:
    with torch.device("meta"):
        model = timm.create_model("everest_pretrain_vit_base_patch16_224")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    official = golden_json("optim_schedule")["pretrain_vit_base"]
    for group, key in zip(parameter_groups(model, 0.05), ("no_decay", "decay"), strict=True):
        assert group["weight_decay"] == official[key]["weight_decay"]
        assert sorted(names[id(p)] for p in group["params"]) == sorted(official[key]["params"])  # type: ignore[attr-defined]


def test_mask_token_of_a_wrapped_model_has_no_decay(mini64: GoldenModel) -> None:
    wrapped = torch.nn.ModuleDict({"model": mini64.autoencoder()})
    no_decay, _ = parameter_groups(wrapped, 0.05)
    assert any(p is wrapped["model"].mask_token for p in no_decay["params"])  # type: ignore[attr-defined]


def test_frozen_parameters_are_in_no_group(mini64: GoldenModel) -> None:
    model = mini64.autoencoder()
    model.encoder.requires_grad_(False)
    grouped = [p for group in parameter_groups(model, 0.05) for p in group["params"]]  # type: ignore[attr-defined]
    assert len(grouped) == sum(p.requires_grad for p in model.parameters())


def test_schedule_equals_official(golden_json: Callable[[str], Any]) -> None:
    cases = golden_json("optim_schedule")["cosine_scheduler"]
    checked = 0
    for case in cases:
        if case["warmup_steps"] > 0:
            continue  # the official code can also count warm-up in steps
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
    optimizer = make_optimizer(
        parameter_groups(mini64.autoencoder(), 0.05), OptimConfig(betas=(0.8, 0.9), eps=1e-6), torch.device("cpu")
    )
    assert [(g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ((0.8, 0.9), 1e-6, 0.0),
        ((0.8, 0.9), 1e-6, 0.05),
    ]
