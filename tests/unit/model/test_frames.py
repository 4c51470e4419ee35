"""Frame selection: counting, drawing and cutting time steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import combinations
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from everest_ds.config import PretrainConfig
from everest_ds.data.demo import DemoConfig, render_video
from everest_ds.model.frames import count_per_step, draw_steps, gather_steps
from everest_ds.model.importance import NO_CHANGE, rero_importance
from everest_ds.model.sizes import get_size
from everest_ds.model.tubelets import TubeletEmbedding, standardise
from everest_ds.recipes import get_recipe
from everest_ds.tokens import TokenGrid, ratio_to_count

NUM_DRAWS = 200_000
PLAIN_DRAWS = 20_000
STANDARD_ERRORS = 3
MOVING_SHARE = 0.9


def draw_many(counts: list[int], num_steps: int, num_draws: int, seed: int) -> Tensor:
    noise_BC = torch.rand(num_draws, len(counts), generator=torch.Generator().manual_seed(seed))
    return draw_steps(torch.tensor(counts).expand(num_draws, -1), noise_BC, num_steps)


def inclusion(steps_BT: Tensor, candidates: int) -> list[float]:
    """Return the share of draws that contain each step."""
    drawn_BC = torch.zeros(len(steps_BT), candidates).scatter_(1, steps_BT, 1.0)
    return drawn_BC.mean(dim=0, dtype=torch.float64).tolist()


def standard_error(probability: float, num_draws: int) -> float:
    return (probability * (1 - probability) / num_draws) ** 0.5


def probability_of_sets(counts: list[int], size: int) -> dict[tuple[int, ...], float]:
    """Return exact probabilities of sets in sequential renormalised draws, summed over the orders of drawing."""

    @cache
    def of(chosen: frozenset[int]) -> float:
        if not chosen:
            return 1.0
        total = 0.0
        for last in chosen:
            before = chosen - {last}
            total += of(before) * counts[last] / sum(c for i, c in enumerate(counts) if i not in before)
        return total

    return {chosen: of(frozenset(chosen)) for chosen in combinations(range(len(counts)), size)}


def draw_plainly(counts: list[int], size: int, generator: random.Random) -> list[int]:
    left = list(range(len(counts)))
    for _ in range(size):
        left.remove(generator.choices(left, weights=[counts[i] for i in left])[0])
    return sorted(set(range(len(counts))) - set(left))


def test_inclusion_probabilities_are_those_of_the_golden_set(golden_json: Callable[[str], Any]) -> None:
    cases = golden_json("selection_cases")["pair_sampling"]
    assert len(cases) == 5
    for number, case in enumerate(cases):
        counts, exact = case["counts"], case["exact_inclusion_probability"]
        measured = inclusion(draw_many(counts, case["draw"], NUM_DRAWS, seed=number), len(counts))
        for step, (share, probability) in enumerate(zip(measured, exact, strict=True)):
            error = standard_error(probability, NUM_DRAWS)
            assert abs(share - probability) <= STANDARD_ERRORS * error, (number, step)


def test_whole_choices_are_as_likely_as_in_sequential_draws() -> None:
    """Inclusion alone would not expose every wrong scheme, so each set of three out of five is compared."""
    counts = [3, 1, 7, 5, 2]
    drawn = draw_many(counts, 3, NUM_DRAWS, seed=9)
    code_B = (2**drawn).sum(dim=1)
    exact = probability_of_sets(counts, 3)
    assert sum(exact.values()) == pytest.approx(1.0)
    for chosen, probability in exact.items():
        share = (code_B == sum(2**step for step in chosen)).double().mean().item()
        assert abs(share - probability) <= STANDARD_ERRORS * standard_error(probability, NUM_DRAWS), chosen


@pytest.mark.parametrize("counts", [[3, 0, 7, 5, 2, 1], [41, 34, 42, 35, 40, 10, 25, 16, 40, 40, 48, 48]])
def test_inclusion_equals_a_plain_sampler(counts: list[int]) -> None:
    size = len(counts) * 2 // 3
    generator = random.Random(5)
    plain = torch.tensor([draw_plainly(counts, size, generator) for _ in range(PLAIN_DRAWS)])
    ours = inclusion(draw_many(counts, size, NUM_DRAWS, seed=11), len(counts))
    for share, other in zip(ours, inclusion(plain, len(counts)), strict=True):
        error = (standard_error(other, PLAIN_DRAWS) ** 2 + standard_error(share, NUM_DRAWS) ** 2) ** 0.5
        assert abs(share - other) <= STANDARD_ERRORS * error


def test_steps_without_chosen_tokens_only_fill_and_do_so_uniformly() -> None:
    counts = [0, 5, 0, 0, 1000, 0, 0]
    drawn = draw_many(counts, 4, NUM_DRAWS, seed=2)
    share = inclusion(drawn, len(counts))
    assert share[1] == share[4] == 1
    for step in (0, 2, 3, 5, 6):  # two of these five fill the clip
        assert abs(share[step] - 0.4) <= STANDARD_ERRORS * standard_error(0.4, NUM_DRAWS)
    assert not set(draw_many([0, 5, 0, 1], 2, 1000, seed=0).flatten().tolist()) & {0, 2}


def test_clip_in_which_nothing_is_chosen_is_drawn_uniformly() -> None:
    share = inclusion(draw_many([0] * 6, 2, NUM_DRAWS, seed=3), 6)
    for of_step in share:
        assert abs(of_step - 1 / 3) <= STANDARD_ERRORS * standard_error(1 / 3, NUM_DRAWS)


def test_noise_of_exactly_zero_is_a_draw_like_any_other() -> None:
    """Zero noise puts a step first among its kind; steps without chosen tokens always follow those with some."""
    counts_BC = torch.tensor([[2, 2, 2, 2], [0, 1, 1, 0], [0, 0, 0, 0]])
    noise_BC = torch.tensor([[0.5, 0.0, 0.9, 0.1], [0.0, 0.99, 0.5, 0.5], [0.5, 0.5, 0.0, 0.9]])
    assert draw_steps(counts_BC, noise_BC, 2).tolist() == [[1, 3], [1, 2], [0, 2]]
    all_zero = draw_steps(counts_BC, torch.zeros(3, 4), 3)
    assert all_zero.tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]


def test_largest_noise_below_one_comes_last_though_its_step_holds_most() -> None:
    largest = 1 - 2**-24
    noise_BC = torch.tensor([[largest, 0.5, 0.5]])
    assert noise_BC.max() < 1
    assert draw_steps(torch.tensor([[5, 1, 1]]), noise_BC, 2).tolist() == [[1, 2]]
    assert draw_steps(torch.tensor([[5, 0, 1]]), noise_BC, 2).tolist() == [[0, 2]]


@st.composite
def races(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Generate counts, noise and a number of steps; counts and noise may be 0."""
    clips, candidates = draw(st.integers(1, 5)), draw(st.integers(1, 14))
    values = clips * candidates
    counts = draw(st.lists(st.integers(0, 200), min_size=values, max_size=values))
    noise = draw(st.lists(st.integers(0, 2**24 - 1), min_size=values, max_size=values))
    noise_BC = torch.tensor(noise, dtype=torch.float32).view(clips, candidates) / 2**24
    return torch.tensor(counts).view(clips, candidates), noise_BC, draw(st.integers(1, candidates))


@given(races())
def test_drawn_steps_are_ascending_distinct_and_of_the_candidates(race: tuple[Tensor, Tensor, int]) -> None:
    counts_BC, noise_BC, num_steps = race
    steps_BT = draw_steps(counts_BC, noise_BC, num_steps)
    assert (steps_BT.shape, steps_BT.dtype) == ((len(counts_BC), num_steps), torch.int64)
    for steps, counts in zip(steps_BT.tolist(), counts_BC.tolist(), strict=True):
        assert steps == sorted(set(steps))
        assert steps[0] >= 0
        assert steps[-1] < len(counts)
        holding = {step for step, count in enumerate(counts) if count}
        assert len(holding & set(steps)) == min(len(holding), num_steps)
    assert torch.equal(steps_BT, draw_steps(counts_BC, noise_BC, num_steps))


@given(races(), st.randoms(use_true_random=False))
def test_permuted_clips_give_permuted_choices(race: tuple[Tensor, Tensor, int], shuffler: random.Random) -> None:
    counts_BC, noise_BC, num_steps = race
    order = list(range(len(counts_BC)))
    shuffler.shuffle(order)
    assert torch.equal(
        draw_steps(counts_BC[order], noise_BC[order], num_steps), draw_steps(counts_BC, noise_BC, num_steps)[order]
    )


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.data())
def test_counts_are_of_the_most_important_tokens(clips: int, time: int, places: int, data: st.DataObject) -> None:
    """With few different values clips have many ties, which the lower position wins."""
    grid = TokenGrid(time=time, rows=1, cols=places)
    values = st.lists(st.integers(0, 3), min_size=grid.num_tokens, max_size=grid.num_tokens)
    importance = [data.draw(values) for _ in range(clips)]
    count = data.draw(st.integers(1, grid.num_tokens))
    counted = count_per_step(torch.tensor(importance, dtype=torch.float32), grid, count, no_change=-1)
    assert counted.dtype == torch.int64
    for of_clip, row in zip(counted.tolist(), importance, strict=True):
        chosen = sorted(range(grid.num_tokens), key=lambda position: (-row[position], position))[:count]
        assert of_clip == [sum(position // places == step for position in chosen) for step in range(time)]


def test_tokens_that_do_not_change_count_nowhere() -> None:
    """If fewer tokens change than are selected, steps without change get a count of 0, wherever they are."""
    importance_BN = torch.zeros(1, 12)
    importance_BN[0, 10] = 1.0
    grid = TokenGrid(time=4, rows=1, cols=3)
    assert count_per_step(importance_BN, grid, 5).tolist() == [[0, 0, 0, 1]]
    assert count_per_step(importance_BN - 1, grid, 5, no_change=NO_CHANGE["cka"]).tolist() == [[0, 0, 0, 1]]
    assert count_per_step(torch.zeros(1, 12), grid, 5).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_gathered_steps_are_those_frames(dtype: torch.dtype) -> None:
    clips_BCTHW = torch.randint(256, (2, 3, 12, 4, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    steps = [[0, 2, 3], [1, 2, 3]]
    chosen = gather_steps(clips_BCTHW, torch.tensor(steps), tubelet_size=3)
    assert chosen.dtype == dtype
    assert chosen.is_contiguous()
    for clip in range(2):
        frames = [3 * step + offset for step in steps[clip] for offset in range(3)]
        expected = torch.stack([clips_BCTHW[clip, :, frame] for frame in frames], dim=1)
        assert torch.equal(chosen[clip], expected)
    every = torch.arange(4).expand(2, -1)
    assert torch.equal(gather_steps(clips_BCTHW, every, tubelet_size=3), clips_BCTHW)


def test_shapes_that_do_not_fit_are_refused() -> None:
    grid = TokenGrid(time=4, rows=1, cols=3)
    with pytest.raises(ValueError, match=r"expected importance \(B, 12\).*got \(2, 9\)"):
        count_per_step(torch.zeros(2, 9), grid, 3)
    for count in (0, 13):
        with pytest.raises(ValueError, match=rf"count={count} must be between 1 and 12"):
            count_per_step(torch.zeros(2, 12), grid, count)
    counts_BC, noise_BC = torch.ones(2, 4, dtype=torch.int64), torch.zeros(2, 4)
    for num_steps in (0, 5):
        with pytest.raises(ValueError, match=rf"num_steps={num_steps} must be between 1 and the 4 candidate steps"):
            draw_steps(counts_BC, noise_BC, num_steps)
    with pytest.raises(ValueError, match=r"expected \(B, C\), got counts \(2, 4\) and noise \(2, 5\)"):
        draw_steps(counts_BC, torch.zeros(2, 5), 2)
    with pytest.raises(ValueError, match=r"float32 noise, got torch.bfloat16"):
        draw_steps(counts_BC, noise_BC.bfloat16(), 2)
    clips_BCTHW = torch.zeros(2, 3, 8, 2, 2)
    with pytest.raises(ValueError, match=r"8 frames are not a whole number of steps of 3 frames"):
        gather_steps(clips_BCTHW, torch.zeros(2, 2, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match=r"expected steps of 2 clips, got shape \(3, 2\)"):
        gather_steps(clips_BCTHW, torch.zeros(3, 2, dtype=torch.int64), 2)


@pytest.mark.gpu
def test_gpu_counts_draws_and_cuts_as_the_cpu_does() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = TokenGrid(time=12, rows=7, cols=7)
    importance_BN = torch.randint(50, (4096, grid.num_tokens), generator=generator).float()  # with ties
    noise_BC = torch.rand(4096, grid.time, generator=generator)
    clips_BCTHW = torch.randint(256, (4096, 3, 24, 2, 2), generator=generator, dtype=torch.uint8)
    results = []
    for device in ("cpu", "cuda"):
        counts_BC = count_per_step(importance_BN.to(device), grid, 176)
        steps_BT = draw_steps(counts_BC, noise_BC.to(device), 8)
        chosen = gather_steps(clips_BCTHW.to(device), steps_BT, 2)
        results.append([part.cpu() for part in (counts_BC, steps_BT, chosen)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert torch.equal(on_cpu, on_gpu)


def half_frozen_clips(config: PretrainConfig, frozen: Literal["first", "second"], movers: int) -> Tensor:
    """Return centre-cropped clips with twice the recipe's frames, at its stride; half of the frames are frozen."""
    data = config.data
    demo = DemoConfig(num_frames=2 * data.num_frames * data.sampling_stride, movers=movers)
    margin = (demo.size - data.image_size) // 2
    clips = []
    for number in range(16):
        frames = render_video(demo, "train", number).copy()
        half = len(frames) // 2
        if frozen == "second":
            frames[half:] = frames[half - 1]
        else:
            frames[:half] = frames[half]
        cropped = frames[:: data.sampling_stride, margin:-margin, margin:-margin].copy()
        clips.append(torch.from_numpy(cropped).permute(3, 0, 1, 2))
    return torch.stack(clips)


# Measured share: 1.000 in all cases. With two movers only 75 of 576 tokens change, fewer than the 172 that rho_pre
# selects.
@pytest.mark.parametrize("movers", [2, 12])
@pytest.mark.parametrize("frozen", ["first", "second"])
@pytest.mark.parametrize("seed", range(4))
def test_moving_half_of_a_video_fills_the_clip(frozen: Literal["first", "second"], movers: int, seed: int) -> None:
    """The demo recipe at alpha = 2: half of the candidates fill the clip, so no frozen step is needed.

    The first frozen step differs from the step before it, so it counts as moving.
    """
    config = get_recipe("demo")
    assert isinstance(config, PretrainConfig)
    clips_BCTHW = half_frozen_clips(config, frozen, movers)
    grid = TokenGrid(time=2 * config.grid.time, rows=config.grid.rows, cols=config.grid.cols)
    torch.manual_seed(seed)
    embedding = TubeletEmbedding(
        width=get_size(config.model.size).width,
        tubelet_size=config.model.tubelet_size,
        patch_size=config.model.patch_size,
    )
    with torch.no_grad():
        importance_BN = rero_importance(embedding(standardise(clips_BCTHW)), grid)
    counts_BC = count_per_step(
        importance_BN, grid, ratio_to_count(grid.num_tokens, config.selection.selected_ratio)
    )
    noise_BC = torch.rand(50 * len(counts_BC), grid.time)
    steps_BT = draw_steps(counts_BC.repeat(50, 1), noise_BC, config.grid.time)
    is_moving = steps_BT <= config.grid.time if frozen == "second" else steps_BT >= config.grid.time
    assert is_moving.double().mean() > MOVING_SHARE
