from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from everest_ds.data.clips.sampling import (
    GlobalBatchSampler,
    RandomStream,
    SampleKey,
    dense_frames,
    epoch_order,
    keyed_generator,
    segment_frames,
    strided_frames,
)


class RecordedDraws:
    """A fake generator: returns recorded draws and checks that the requested range is the recorded one."""

    def __init__(self, draws: list[dict[str, Any]]) -> None:
        self.draws = list(draws)

    def integers(self, *args: int, size: int | None = None) -> Any:
        draw = self.draws.pop(0)
        assert draw["args"] == list(args)
        value = draw["value"]
        if size is None:
            return value[0] if draw["size"] == 1 else value
        assert draw["size"] == size
        return np.array(value)


def test_stride_indices_equal_official(golden_json: Callable[[str], Any]) -> None:
    cases = golden_json("frame_sampling")["pretrain_train"]
    assert len(cases) == 23
    for case in cases:
        recorded = RecordedDraws(case["random_draws"] or [])
        indices = strided_frames(
            case["num_frames"],
            case["clip_len"],
            case["sampling_rate"],
            recorded,  # type: ignore[arg-type]
        )
        assert indices == case["indices"], case["num_frames"]
        # If only one start is possible, the official code still draws it; so do we.
        assert not recorded.draws


def test_dense_indices_equal_official(golden_json: Callable[[str], Any]) -> None:
    cases = golden_json("frame_sampling")["finetune_dense_train_and_val"]
    assert len(cases) == 23
    for case in cases:
        recorded = RecordedDraws(case["random_draws"])
        indices = dense_frames(
            case["num_frames"],
            case["clip_len"],
            case["sampling_rate"],
            recorded,  # type: ignore[arg-type]
        )
        assert indices == case["indices"], case["num_frames"]
        assert not recorded.draws


def test_segment_indices_equal_official(golden_json: Callable[[str], Any]) -> None:
    cases = [case for case in golden_json("frame_sampling")["ssv2_segment"] if case["mode"] == "train"]
    assert len(cases) == 10
    for case in cases:
        recorded = RecordedDraws(case["random_draws"])
        indices = segment_frames(case["num_frames"], case["num_segment"], recorded)  # type: ignore[arg-type]
        assert indices == case["indices"], case["num_frames"]
        assert not recorded.draws


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5, 16, 17, 31, 64, 65, 100])
@pytest.mark.parametrize("draw_frames", [strided_frames, dense_frames, segment_frames])
def test_indices_stay_inside_the_video(draw_frames: Callable[..., list[int]], num_frames: int) -> None:
    spacing = () if draw_frames is segment_frames else (4,)
    for seed in range(20):
        indices = draw_frames(num_frames, 16, *spacing, keyed_generator(seed, RandomStream.FRAMES, 0))
        assert len(indices) == 16
        assert all(type(index) is int for index in indices)
        assert min(indices) >= 0
        assert max(indices) < num_frames
        assert indices == sorted(indices)


@pytest.mark.parametrize("draw_frames", [strided_frames, dense_frames, segment_frames])
def test_video_without_frames_is_refused(draw_frames: Callable[..., list[int]]) -> None:
    spacing = () if draw_frames is segment_frames else (4,)
    with pytest.raises(ValueError, match="must be at least 1"):
        draw_frames(0, 16, *spacing, keyed_generator(0, RandomStream.FRAMES, 0))


def test_keyed_generators_repeat_and_differ_by_every_part_of_the_key() -> None:
    def draw(*key: int) -> float:
        seed, stream, epoch, index, repeat = key
        return keyed_generator(seed, RandomStream(stream), epoch, index, repeat).random()

    base = (1, 1, 2, 3, 4)
    neighbours = [tuple(value + (i == position) for i, value in enumerate(base)) for position in range(5)]
    assert draw(*base) == draw(*base)
    assert len({draw(*key) for key in [base, *neighbours]}) == 6


def test_draws_of_one_sample_do_not_run_into_the_next() -> None:
    many = keyed_generator(0, RandomStream.NOISE, 0, 0).random(10_000)
    following = keyed_generator(0, RandomStream.NOISE, 0, 1).random(10_000)
    assert not np.intersect1d(many, following).size


def test_epoch_order_is_a_permutation_that_changes_with_seed_and_epoch() -> None:
    orders = [epoch_order(50, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def global_batches(*, world_size: int, micro_size: int, start_step: int = 0) -> list[set[SampleKey]]:
    """Return the samples of each step, over all ranks."""
    samplers = [
        GlobalBatchSampler(
            num_samples=50,
            global_size=8,
            micro_size=micro_size,
            rank=rank,
            world_size=world_size,
            seed=3,
            start_step=start_step,
            end_step=14,
        )
        for rank in range(world_size)
    ]
    per_rank = [list(sampler) for sampler in samplers]
    assert all(len(batches) == len(sampler) for batches, sampler in zip(per_rank, samplers, strict=True))
    accumulation = 8 // (micro_size * world_size)
    steps = []
    for step in range(14 - start_step):
        micro_batches = [b for batches in per_rank for b in batches[step * accumulation :][:accumulation]]
        keys = [key for batch in micro_batches for key in batch]
        assert len(keys) == len(set(keys)) == 8
        steps.append(set(keys))
    return steps


@pytest.mark.parametrize(("world_size", "micro_size"), [(1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_global_batch_is_the_same_on_any_number_of_processes(world_size: int, micro_size: int) -> None:
    expected = global_batches(world_size=1, micro_size=8)
    assert global_batches(world_size=world_size, micro_size=micro_size) == expected


def test_sampler_goes_on_from_any_step() -> None:
    whole = global_batches(world_size=2, micro_size=2)
    assert global_batches(world_size=2, micro_size=2, start_step=9) == whole[9:]


def test_sampler_visits_no_sample_twice_in_an_epoch() -> None:
    steps = global_batches(world_size=1, micro_size=8)
    first_epoch = [key for step in steps[:6] for key in step]
    assert {key.epoch for key in first_epoch} == {0}
    assert len({key.index for key in first_epoch}) == 48
    assert {key.epoch for key in steps[6]} == {1}


def repeated_batch(rank: int, *, world_size: int, micro_size: int) -> list[list[SampleKey]]:
    sampler = GlobalBatchSampler(
        num_samples=11,
        global_size=12,
        micro_size=micro_size,
        rank=rank,
        world_size=world_size,
        seed=3,
        repeats=3,
        end_step=4,
    )
    assert sampler.steps_per_epoch == 2
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def test_repeats_draw_each_video_of_a_batch_that_often_with_different_neighbours() -> None:
    batches = repeated_batch(0, world_size=1, micro_size=12)
    for step, batch in enumerate(batches):
        assert {key.epoch for key in batch} == {step // 2}
        videos = list(dict.fromkeys(key.index for key in batch))
        assert len(videos) == 4
        pairs = (videos[:2], videos[2:])
        expected = [(index, repeat) for pair in pairs for repeat in (0, 1, 2) for index in pair]
        assert [(key.index, key.repeat) for key in batch] == expected
        assert all(one.index != other.index for one, other in pairwise(batch))
    first_epoch = {key.index for batch in batches[:2] for key in batch}
    assert len(first_epoch) == 8  # no video in two batches of an epoch
    order = epoch_order(11, 3, 0)
    assert [key.index for key in batches[0] if key.repeat == 0] == order[:4].tolist()


def test_repeats_make_the_same_global_batch_on_any_number_of_processes() -> None:
    whole = repeated_batch(0, world_size=1, micro_size=12)
    parts = [repeated_batch(rank, world_size=3, micro_size=2) for rank in range(3)]
    for step, batch in enumerate(whole):
        merged = [key for micro in (2 * step, 2 * step + 1) for rank in range(3) for key in parts[rank][micro]]
        assert merged == batch


def test_sampler_refuses_what_makes_no_batch() -> None:
    good = {"global_size": 8, "micro_size": 2, "rank": 0, "world_size": 2, "seed": 0, "end_step": 1}
    with pytest.raises(ValueError, match="make no batch"):
        GlobalBatchSampler(num_samples=7, **good)
    with pytest.raises(ValueError, match="does not divide"):
        GlobalBatchSampler(num_samples=50, **{**good, "micro_size": 3})
    with pytest.raises(ValueError, match="repeats=3 does not divide global_size=8"):
        GlobalBatchSampler(num_samples=50, **good, repeats=3)
    with pytest.raises(ValueError, match="repeats=0 does not divide"):
        GlobalBatchSampler(num_samples=50, **good, repeats=0)
    with pytest.raises(ValueError, match="3 samples, drawn 2 times, make no batch of 8"):
        GlobalBatchSampler(num_samples=3, **good, repeats=2)
