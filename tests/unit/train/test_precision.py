"""Precision of a run: how it is chosen, DeepSpeed's sections, and the parts that autocast leaves in float32."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from everest_ds.config import FinetuneConfig, FinetuneDataConfig, PretrainConfig
from everest_ds.errors import UserError
from everest_ds.model import transformer
from everest_ds.model.importance import DistanceName
from everest_ds.model.packing import Packing
from everest_ds.recipes import get_recipe
from everest_ds.train.engine import load_systems, resolve_ds_config
from everest_ds.train.precision import AUTOCAST, BF16, FP32, PRECISIONS, Precision, choose_precision, precision_of
from everest_ds.train.tasks import FinetuneTask, PretrainTask
from tests.conftest import REPOSITORY

# Gradients under autocast against float32, relative to each weight's largest; measured 0.011.
GRADIENT_RTOL = 0.05


@pytest.mark.parametrize(
    ("systems", "asked", "device", "expected"),
    [
        ({"bf16": {"enabled": True}}, "auto", "cpu", BF16),
        ({"bf16": {"enabled": False}}, "auto", "cuda", FP32),
        ({}, "auto", "cuda", BF16),
        ({}, "auto", "cpu", FP32),
        ({"bf16": {"enabled": True}}, "fp32", "cuda", FP32),
        ({"bf16": {"enabled": False}}, "bf16", "cpu", BF16),
        ({"bf16": {"enabled": True}}, "autocast", "cuda", AUTOCAST),
        ({"communication_data_type": "fp32"}, "autocast", "cpu", AUTOCAST),
    ],
)
def test_precision_follows_option_then_file_then_device(
    systems: dict[str, object], asked: str, device: str, expected: Precision
) -> None:
    assert choose_precision(systems, asked, device) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("stage", range(4))
def test_sections_say_what_was_asked_for_whatever_the_file_says(name: str, stage: int) -> None:
    systems = load_systems(REPOSITORY / "ds_configs" / f"zero{stage}.json")
    resolved = resolve_ds_config(
        systems,
        get_recipe("k400_vit_b"),
        world_size=8,
        precision=name,  # type: ignore[arg-type]
        device_type="cuda",
    )
    assert precision_of(resolved) == PRECISIONS[name]
    assert resolved["bf16"] == {"enabled": name == "bf16", "check_grad_overflow": True}
    assert resolved["fp16"] == {"enabled": False}
    assert resolved["communication_data_type"] == ("bf16" if name == "bf16" else "fp32")
    assert ("data_types" in resolved) == (name == "bf16" and stage > 0)
    expected = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert resolved["torch_autocast"] == (expected if name == "autocast" else {"enabled": False})


def test_autocast_refuses_to_send_gradients_in_bfloat16() -> None:
    with pytest.raises(UserError, match=r"communication_data_type=bf16 .*remove the key, or use --precision bf16"):
        choose_precision({"communication_data_type": "bf16"}, "autocast", "cuda")
    assert choose_precision({"communication_data_type": "bf16"}, "bf16", "cuda") == BF16


def test_choosing_needs_no_torch() -> None:
    code = "import sys; from everest_ds.train.precision import choose_precision as c; c({}, 'auto', 'cpu')"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True, cwd=REPOSITORY)


def small_pretrain(**model: object) -> PretrainConfig:
    config = get_recipe("demo")
    assert isinstance(config, PretrainConfig)
    data = replace(config.data, num_frames=8, image_size=32)
    return replace(config, data=data, model=replace(config.model, **model))


def make_pretrain(**model: object) -> tuple[PretrainTask, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    config = small_pretrain(**model)
    return PretrainTask(config), (random_clips(), torch.rand(3, config.num_selected))


def random_clips() -> Tensor:
    return torch.randint(0, 256, (3, 3, 8, 32, 32), dtype=torch.uint8)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine", "cka"])
@pytest.mark.parametrize("embedding_layers", [1, 2, 3])
def test_ranking_under_autocast_is_that_of_float32_bit_for_bit(
    embedding_layers: int, distance: DistanceName
) -> None:
    """Ranking is bitwise identical; the embedding outside of ranking is not."""
    task, (clips, _) = make_pretrain(embedding_layers=embedding_layers)
    encoder = task.model.encoder
    (group,) = encoder.group(clips)
    expected = encoder.rank(group, distance)
    with autocast():
        assert torch.equal(encoder.rank(group, distance), expected)
        embedded = encoder.patch_embed(clips.float() / 255)
    assert expected.dtype == torch.float32
    assert embedded.dtype == torch.bfloat16


def test_chosen_frames_under_autocast_are_those_of_float32() -> None:
    task, (clips, _) = make_pretrain()
    encoder = task.model.encoder
    (group,) = encoder.group(clips)
    noise_BK = torch.rand(3, group.grid.time)
    expected = encoder.choose_frames(group, noise_BK, 2, ratio=0.3)
    with autocast():
        found = encoder.choose_frames(group, noise_BK, 2, ratio=0.3)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2].steps_BT, expected[2].steps_BT)
    assert torch.equal(found[2].counts_BC, expected[2].counts_BC)


def test_targets_tokens_and_loss_under_autocast_are_float32_and_the_same() -> None:
    task, (clips, noise) = make_pretrain()
    expected = task.model(clips, noise)
    with autocast():
        found = task.model(clips, noise)
        loss = found.loss
    assert torch.equal(found.target_RP, expected.target_RP)
    assert torch.equal(found.selection.visible.position_M, expected.selection.visible.position_M)
    assert torch.equal(found.selection.target.position_M, expected.selection.target.position_M)
    assert found.prediction_RP.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert 0 < abs((loss / expected.loss).item() - 1) < 1e-2
    by_hand = (found.prediction_RP.double() - found.target_RP.double()).square().mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def watch(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """Return the dtypes that attention, blocks, norms and linear layers get and return, filled during forward."""
    seen: dict[str, set[torch.dtype]] = {"attention": set(), "rows": set(), "norms": set(), "linear": set()}
    attend = transformer.attention

    def watched(qkv: Tensor, packing: Packing, *, backend: str) -> Tensor:
        seen["attention"].add(qkv.dtype)
        return attend(qkv, packing, backend=backend)

    monkeypatch.setattr(transformer, "attention", watched)
    for module in model.modules():
        if isinstance(module, transformer.Block):
            module.register_forward_hook(lambda m, given, out: seen["rows"].update({given[0].dtype, out.dtype}))
        elif isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda m, given, out: seen["norms"].update({given[0].dtype, out.dtype}))
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, given, out: seen["linear"].add(out.dtype))
    return seen


def test_products_under_autocast_are_bfloat16_and_rows_and_norms_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention gets bfloat16, as its GPU kernels require; the residual stream and norms are float32."""
    task, inputs = make_pretrain()
    seen = watch(task.model, monkeypatch)
    with autocast():
        task(*inputs)
    assert seen == {
        "attention": {torch.bfloat16},
        "rows": {torch.float32},
        "norms": {torch.float32},
        "linear": {torch.bfloat16},
    }


@pytest.mark.parametrize("drop_path", [0.0, 0.2])
def test_classifier_under_autocast_sums_its_branches_in_float32(
    drop_path: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = get_recipe("demo_ft")
    assert isinstance(config, FinetuneConfig)
    data = FinetuneDataConfig(num_classes=5, num_frames=8, image_size=32)
    config = replace(config, data=data, model=replace(config.model, drop_path=drop_path))
    torch.manual_seed(0)
    task = FinetuneTask(config)
    noise = torch.rand(3, task.model.num_noise(config.grid))
    seen = watch(task.model, monkeypatch)
    with autocast():
        logits = task(random_clips(), None, noise)
        loss = task(random_clips(), torch.tensor([0, 1, 2]), noise)
    assert (seen["attention"], seen["rows"], seen["norms"]) == ({torch.bfloat16}, {torch.float32}, {torch.float32})
    assert (logits.dtype, loss.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    "model",
    [{}, {"activation_checkpointing": True}, {"activation_checkpointing": True, "recompute_attention": False}],
    ids=["nothing recomputed", "all", "all but attention"],
)
def test_every_weight_has_a_float32_gradient_under_autocast_close_to_float32s(model: dict[str, bool]) -> None:
    """Includes embedding weights, which ranking uses without gradients, and weights of recomputed blocks."""

    def gradients(lowers: bool) -> dict[str, Tensor]:
        task, inputs = make_pretrain(**model)
        with torch.autocast("cpu", torch.bfloat16, enabled=lowers):
            loss = task(*inputs)
        loss.backward()
        return {name: p.grad for name, p in task.named_parameters() if p.grad is not None}

    found, expected = gradients(True), gradients(False)
    assert found.keys() == expected.keys() == dict(make_pretrain()[0].named_parameters()).keys()
    worst = 0.0
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        difference = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        worst = max(worst, float(difference))
    print(f"worst {worst:.3f}")
    assert 0 < worst < GRADIENT_RTOL
