from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from everest_ds.model.attention import BACKENDS
from everest_ds.model.selection import SelectionRule
from everest_ds.recipes import get_recipe
from everest_ds.train.tasks import PretrainTask


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_cost_of_a_clip_does_not_depend_on_the_attention_backend(backend: str) -> None:
    config = get_recipe("demo")
    task = PretrainTask(replace(config, model=replace(config.model, attention=backend)))
    assert task.clip_flops() == PretrainTask(config).clip_flops() > 0


def test_loss_is_the_models_for_either_kind_of_target() -> None:
    config = get_recipe("demo")
    clips = torch.randint(0, 256, (2, 3, 16, 48, 48), dtype=torch.uint8)
    noise = torch.rand(2, config.num_selected)
    for targets in ("masked", "selected"):
        torch.manual_seed(0)
        task = PretrainTask(replace(config, selection=replace(config.selection, targets=targets)))
        output = task.model(clips, noise, SelectionRule(targets=targets))
        assert torch.equal(task(clips, noise), output.loss)
        assert len(output.target_RP) == 2 * task.config.num_targets
