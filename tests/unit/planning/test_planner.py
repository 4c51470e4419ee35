"""The planner: settings, the rule of the recommendation, and advice if nothing fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from everest_ds.config import BatchConfig, Config, FinetuneConfig, GradientsName, PretrainConfig, SelectionConfig
from everest_ds.planning.memory import GIB, MemoryEstimate, describe_estimate, describe_peak, estimate_memory
from everest_ds.planning.planner import Setting, in_gib, plan_settings, recommend, smallest_change
from everest_ds.planning.sharding import ParameterCounts, Sharding, bytes_sent, count_parameters
from everest_ds.recipes import get_recipe
from everest_ds.train.engine import resolve_ds_config, shipped_systems
from everest_ds.train.precision import PrecisionName

SYSTEMS = shipped_systems()


def estimate(config: Config, name: str, *, gpus: int = 8, **zero: object) -> MemoryEstimate:
    systems = SYSTEMS[name]
    systems = systems | {"zero_optimization": systems["zero_optimization"] | zero}
    resolved = resolve_ds_config(systems, config, world_size=gpus, precision="auto", device_type="cuda")
    return estimate_memory(config, resolved, world_size=gpus)


def plan(config: Config, *, gpus: int, gib: float) -> list[Setting]:
    return plan_settings(config, SYSTEMS, num_gpus=gpus, memory_bytes=int(gib * GIB))


def test_shipped_files_are_found_in_their_order() -> None:
    assert list(SYSTEMS) == ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]


def test_parameters_are_counted_and_partitioned_as_by_hand() -> None:
    assert count_parameters(get_recipe("k400_vit_h")).total == 653_104_256  # as in test_registry.py
    counts = ParameterCounts(groups=((5, 3), (10, 1, 7)), buffers=4)
    assert counts.aligned(4) == [8, 24]  # padded to two elements for each of four processes
    assert counts.partitioned(4) == [2 + 1, 3 + 1 + 2]
    # Every rank has 2 elements of the first group and 6 of the second, whose partitions end at 6, 12 and 18: rank 0
    # touches 5 and 10; rank 1 touches 5, 10, 1 and 7; rank 2 touches 5, 3 and 7; rank 3 touches 3 and padding.
    assert counts.touching(4) == 5 + 10 + 1 + 7


def linear_probe() -> FinetuneConfig:
    config = get_recipe("k400_vit_l_ft")
    assert isinstance(config, FinetuneConfig)
    return replace(config, model=replace(config.model, drop_path=0.0, freeze_encoder=True))


def test_parameters_of_a_fine_tuning_are_counted_by_layer() -> None:
    """A recipe does not know its number of classes, so 400 are assumed."""
    config = get_recipe("k400_vit_l_ft")
    block = 12 * 1024**2 + 12 * 1024  # matrices; then norms 4, biases of qkv 2, of proj and MLP 6
    head = 2 * 1024 + 1024 * 400 + 400
    counts = count_parameters(config)
    assert counts.total == sum(counts.trained) == 1537 * 1024 + 24 * block + head
    assert len(counts.groups) == 2 * (24 + 2)
    with_classes = replace(config, data=replace(config.data, num_classes=10))
    assert count_parameters(with_classes).total == counts.total - 390 * 1025
    probe = count_parameters(linear_probe())
    assert sum(probe.trained) == head
    assert probe.total == counts.total
    assert sorted(map(sum, probe.groups)) == [2 * 1024 + 400, 1024 * 400]


def test_frozen_parameters_cost_their_weights_alone() -> None:
    head, world = 2 * 1024 + 1024 * 400 + 400, 8
    whole, probe = estimate(get_recipe("k400_vit_l_ft"), "zero2"), estimate(linear_probe(), "zero2")
    assert probe.parameters == pytest.approx(whole.parameters, rel=1e-5)
    assert probe.optimizer == pytest.approx(12 * head / world, rel=1e-3)
    assert probe.gradients == pytest.approx(2 * head, rel=1e-3)
    assert probe.part == pytest.approx(4 * head / world, rel=1e-3)
    assert probe.activations < 0.05 * whole.activations
    assert probe.sent < 0.01 * whole.sent
    sharded = estimate(linear_probe(), "zero3")
    assert sharded.parameters == pytest.approx(estimate(get_recipe("k400_vit_l_ft"), "zero3").parameters, rel=1e-3)
    assert sharded.optimizer == pytest.approx(12 * head / world, rel=1e-3)


def test_moving_average_costs_four_bytes_a_parameter_over_the_processes() -> None:
    config = get_recipe("k400_vit_l_ft")
    averaged = replace(config, optim=replace(config.optim, ema_decay=0.999))
    for name in SYSTEMS:
        plain, found = estimate(config, name), estimate(averaged, name)
        assert plain.average == 0
        assert found.average == 4 * -(-count_parameters(config).total // 8)
        assert found.allocated == plain.allocated + found.average
    assert "moving average 0.14" in describe_estimate(found)


def test_all_tokens_kept_means_nothing_is_ranked() -> None:
    config = get_recipe("oscc_vit_b_ft")
    assert estimate(config, "zero2").ranking == 0
    fewer = replace(config, selection=replace(config.selection, keep_ratio=0.6))
    assert estimate(fewer, "zero2").ranking > 0
    clip, noise, label = 3 * 16 * 224**2, 2 * 12 * 4, 8
    assert estimate(config, "zero2").input == config.batch.micro_size * (clip + noise + label)
    mixed = replace(config, data=replace(config.data, mixup_alpha=0.8, num_classes=5))
    assert estimate(mixed, "zero2").input == config.batch.micro_size * (clip + noise + 5 * 4)


def test_budgets_and_candidate_frames_are_planned_for_the_most_that_there_may_be() -> None:
    config = get_recipe("k400_vit_b")
    assert isinstance(config, PretrainConfig)
    plain = estimate(config, "zero2")
    found = {}
    for ceiling in (0.3, 0.6, 1.0):
        shared = SelectionConfig(budget="batch", ceiling=ceiling)
        found[ceiling] = estimate(replace(config, selection=shared), "zero2")
    assert found[0.3].activations == plain.activations
    assert found[0.6].activations == pytest.approx(2 * plain.activations, rel=0.05)  # twice the tokens
    assert found[1.0].activations > found[0.6].activations
    chosen = estimate(replace(config, selection=SelectionConfig(alpha=1.5)), "zero2")
    assert chosen.activations == plain.activations
    pixels, noise = 3 * 224**2 * (24 + 16), 4 * (470 + 12)  # candidates and chosen frames
    assert chosen.input == config.batch.micro_size * (pixels + noise)
    assert estimate(replace(config, selection=SelectionConfig(strategy="tube")), "zero2").ranking == 0


def test_parts_make_the_total_and_say_so() -> None:
    found = estimate(get_recipe("k400_vit_l"), "zero3")
    parts = found.parameters + found.gradients + found.optimizer + found.input + found.communication
    assert found.allocated == parts + found.gathered + found.activations
    assert found.total == found.allocated + found.overhead
    line = describe_estimate(found)
    assert f"{found.allocated / GIB:.2f} GiB allocated" in line
    assert "gathered 0.59" in line
    copies = f"{found.copies / GIB:.2f}"
    assert line.endswith(f"; {copies} GiB of host memory, {copies} of them for copies of checkpoints")
    offloaded = estimate(get_recipe("k400_vit_l"), "zero3_offload")
    assert offloaded.host_memory == offloaded.host + offloaded.copies > offloaded.host > 0
    assert describe_peak(found, found.allocated / GIB * 1.1).endswith("(+10.0%)")


def test_copies_of_checkpoints_are_what_rank_zero_writes() -> None:
    """8 ranks: all bfloat16 weights, an eighth of float32 weights and two moments; at stage 3 an eighth of all."""
    config = get_recipe("k400_vit_l")
    parameters = count_parameters(config).total
    assert estimate(config, "zero2").copies == pytest.approx((2 + 12 / 8) * parameters, rel=1e-6)
    assert estimate(config, "zero3").copies == pytest.approx((2 + 12) / 8 * parameters, rel=1e-6)
    assert estimate(config, "zero0").copies == pytest.approx((2 + 12) * parameters, rel=1e-6)
    waiting = replace(config, run=replace(config.run, save_async=False))
    assert estimate(waiting, "zero2").copies == 0
    assert "host" not in describe_estimate(estimate(waiting, "zero2"))


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_autocast_holds_float32_states_and_activations_in_between(name: str) -> None:
    """Stage 3 has no copies of weights. 86 M parameters, and those of the decoder."""

    def of(precision: PrecisionName) -> MemoryEstimate:
        config = replace(get_recipe("k400_vit_b"), batch=BatchConfig(global_size=512, micro_size=64))
        resolved = resolve_ds_config(SYSTEMS[name], config, world_size=8, precision=precision, device_type="cuda")
        return estimate_memory(config, resolved, world_size=8)

    bf16, autocast, fp32 = of("bf16"), of("autocast"), of("fp32")
    assert (autocast.states, autocast.step, autocast.communication) == (fp32.states, fp32.step, fp32.communication)
    assert (autocast.gathered, autocast.sent) == (fp32.gathered, fp32.sent)
    assert autocast.attention == bf16.attention < fp32.attention
    assert bf16.activations < autocast.activations < fp32.activations


def test_planned_precision_is_named_where_the_file_means_another() -> None:
    config = get_recipe("k400_vit_l")
    asked: tuple[PrecisionName, ...] = ("auto", "bf16", "autocast", "fp32")
    for precision, expected in zip(asked, (None, None, "autocast", "fp32"), strict=True):
        settings = plan_settings(config, SYSTEMS, num_gpus=8, memory_bytes=80 * GIB, precision=precision)
        assert {setting.precision for setting in settings} == {expected}
        assert not any(
            setting.needs_same_world for setting in settings if expected
        )  # float32 at stage 0 resumes on any number of GPUs
        change = smallest_change(config, SYSTEMS, num_gpus=8, memory_bytes=GIB, precision=precision)
        assert change.leanest.precision == expected


def test_an_option_that_is_not_modelled_is_named() -> None:
    found = estimate(get_recipe("k400_vit_b"), "zero3", zero_hpz_partition_size=2)
    assert found.not_modelled == ("zero_hpz_partition_size",)
    assert "not counted: zero_hpz_partition_size" in describe_estimate(found)
    found = estimate(get_recipe("k400_vit_b"), "zero2", offload_optimizer={"device": "cpu"})
    assert found.not_modelled == ("offload_optimizer other than to the CPU at stage 3",)


# Elements in all-reduce, gather and scatter calls of a step of two micro-steps, counted in DeepSpeed with two
# processes, per parameter: bf16, 24.0 M parameters, 0.294 M of which are small enough to stay whole at stage 3.
COUNTED_CALLS = {
    ("zero0", "deepspeed"): 2 * 1.0,
    ("zero1", "deepspeed"): 2 * 1.0 + 1.0,
    ("zero2", "deepspeed"): 2 * 2.0 + 1.0,
    ("zero3", "deepspeed"): 2 * 0.988 + 0.012 + 2.0,
    ("zero0", "flat"): 2 * 1.0,
    ("zero1", "flat"): 1.0 + 1.0,
    ("zero2", "flat"): 2 * 1.0 + 1.0,
}


@pytest.mark.parametrize(("name", "gradients"), COUNTED_CALLS)
def test_bytes_sent_are_those_of_the_calls_that_were_counted(name: str, gradients: GradientsName) -> None:
    config = replace(get_recipe("k400_vit_s"), batch=BatchConfig(global_size=4, micro_size=1))
    resolved = resolve_ds_config(SYSTEMS[name], config, world_size=2, precision="auto", device_type="cuda")
    counts = count_parameters(config)
    expected = COUNTED_CALLS[name, gradients] * counts.total * 2 / 2  # two bytes per element, one peer
    assert bytes_sent(counts, Sharding.of(resolved, 2, gradients)) == pytest.approx(expected, rel=1e-3)


def test_released_parameters_are_gathered_twice() -> None:
    config = get_recipe("k400_vit_l")
    once = estimate(config, "zero3").sent
    twice = estimate(config, "zero3", stage3_max_reuse_distance=1_000_000, stage3_max_live_parameters=50_000_000)
    assert 1.45 < twice.sent / once < 1.55  # two gathers and a scatter against one of each
    assert twice.gathered == 50_000_000 * 2


def test_each_setting_takes_the_largest_micro_batch_that_fits() -> None:
    config = get_recipe("k400_vit_h")
    settings = plan(config, gpus=8, gib=12)
    assert [(setting.name, setting.checkpointing, setting.recomputes_attention) for setting in settings] == [
        (name, *recomputes) for name in SYSTEMS for recomputes in ((False, False), (True, False), (True, True))
    ]
    for setting in settings:
        assert setting.micro_size * setting.sharding.accumulation_steps * 8 == config.batch.global_size
        if setting.estimate.total <= 12 * GIB and setting.sharding.accumulation_steps > 1:
            batch = replace(config.batch, micro_size=2 * setting.micro_size)
            larger = replace(setting.config, batch=batch)
            assert estimate(larger, setting.name).total > 12 * GIB


def test_recommendation_follows_its_rule() -> None:
    config = get_recipe("k400_vit_l")

    def chosen(gib: float) -> tuple[str, bool, int]:
        setting = recommend(plan(config, gpus=8, gib=gib), int(gib * GIB))
        assert setting is not None
        assert setting.estimate.total <= gib * GIB
        return setting.name, setting.checkpointing, setting.sharding.accumulation_steps

    # zero0 fits and sends less, but resumes on the same number of GPUs only; zero1 sends as much and needs more.
    assert chosen(80) == ("zero2", False, 1)
    assert chosen(16) == ("zero2", False, 1)
    assert chosen(9)[1:] == (False, 2)  # accumulation is preferred to recomputation
    fitting = [s for s in plan(config, gpus=8, gib=9) if s.checkpointing and s.estimate.total <= 9 * GIB]
    best = recommend(fitting, 9 * GIB)
    assert best is not None
    assert not best.recomputes_attention  # attention's outputs are saved if they fit
    assert chosen(3.4)[0] == "zero3_offload"  # offloading only if nothing else fits
    assert recommend(plan(config, gpus=8, gib=1), GIB) is None


def test_smallest_change_is_one_that_fits_and_less_does_not() -> None:
    config = get_recipe("k400_vit_h")
    memory = int(6.2 * GIB)
    systems = {"zero2": SYSTEMS["zero2"]}
    assert recommend(plan_settings(config, systems, num_gpus=8, memory_bytes=memory), memory) is None
    change = smallest_change(config, systems, num_gpus=8, memory_bytes=memory)
    enough = change.leanest.estimate.total
    assert recommend(plan_settings(config, systems, num_gpus=8, memory_bytes=enough), enough) is not None
    assert recommend(plan_settings(config, systems, num_gpus=8, memory_bytes=enough - 1), enough - 1) is None
    assert change.more_gpus is not None
    assert change.more_gpus.sharding.world_size == 16
    assert recommend(plan_settings(config, systems, num_gpus=16, memory_bytes=memory), memory) is not None
    assert smallest_change(config, systems, num_gpus=8, memory_bytes=GIB).more_gpus is None


def test_gib_are_rounded_up() -> None:
    assert in_gib(GIB) == 1.0
    assert in_gib(GIB + 1) == 1.01


def test_pool_of_a_graph_and_the_step_add_up() -> None:
    """Also: nothing is captured on a CPU, at ZeRO-3, or with varying budgets."""
    config = replace(get_recipe("k400_vit_l"), batch=BatchConfig(global_size=256, micro_size=32))
    eager = estimate(replace(config, model=replace(config.model, cuda_graph="off")), "zero2")
    captured = estimate(config, "zero2")
    assert eager.pool == 0
    assert captured.pool == eager.transient + captured.input
    assert captured.allocated - eager.allocated == captured.step + captured.input
    varying = replace(config, selection=SelectionConfig(budget="batch", ceiling=0.6))
    assert estimate(config, "zero3").pool == estimate(varying, "zero2").pool == 0
    resolved = resolve_ds_config(SYSTEMS["zero2"], config, world_size=8, precision="bf16", device_type="cpu")
    assert estimate_memory(config, resolved, world_size=8, device_type="cpu").pool == 0
