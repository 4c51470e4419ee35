"""`everest benchmark step RECIPE --compare everest videomae`: our step and the official ones, in turns.

Both sides start from the same weights and the same clips on the device, and do forward and backward pass, targets
and loss included, gradients fresh in every step. Neither takes an optimiser step, and nothing is sent: what is
compared is the model and what its step computes. Ours begins with uint8 clips and standardises them; theirs gets
them standardised, as their loader would, for free. VideoMAE sees a tenth of the tokens in tubes and predicts all
others. In bf16 our weights are bf16, as under DeepSpeed, and theirs float32 under autocast, as their loop has it.
With --precision autocast both are alike.

The sides take turns (`turns`); what counts is the median over rounds of the ratio within a round.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from everest_ds.benchmark.official_step import OfficialStep, load_official, make_official_model, require_comparable
from everest_ds.benchmark.step_options import ReferenceName
from everest_ds.benchmark.timing import Outcome, Side, milliseconds, take_turns
from everest_ds.benchmark.workbench import synthetic_batch
from everest_ds.config import PretrainConfig
from everest_ds.model.tubelets import standardise
from everest_ds.tokens import count_places
from everest_ds.train.precision import Precision
from everest_ds.train.tasks import Task, make_task

OURS = "ours"
# VideoMAE shows a tenth of the tokens to its encoder (its recipes for Kinetics and SSv2).
TUBE_VISIBLE = 0.1


def compare_steps(
    config: PretrainConfig,
    names: Sequence[ReferenceName],
    micro_sizes: Iterable[int],
    *,
    precision: Precision,
    device: torch.device,
    rounds: int,
    warmup: int,
) -> Iterator[dict[str, Any]]:
    """Yield a line for each micro-batch, until ours does not fit; who did not fit takes no part in larger ones.

    Args:
        config: The run; its batch does not count.
        names: Whom to compare with.
        micro_sizes: Clips of a step.
        precision: What ours computes in; theirs is float32, with products in the same dtype as ours.
        device: Where.
        rounds: Timed steps of each side.
        warmup: Steps of each side before them.

    Raises:
        UserError: The official code cannot do what the configuration says, or is not to be had.
    """
    require_comparable(config, names)
    official = {name: load_official(name, config.model.size) for name in names}
    torch.manual_seed(config.run.seed)
    task = make_task(config).to(device)
    references = {}
    for name, code in official.items():
        model = make_official_model(code, config).to(device)
        model.load_state_dict(task.model.state_dict())  # their names are ours: the same weights, or an error
        references[name] = OfficialStep(code, model, precision.products_dtype)
    task.to(precision.weights_dtype)
    for micro_size in micro_sizes:
        sides = _sides(task, references, config, micro_size, device, autocasts=precision.autocasts)
        outcomes = take_turns(sides, device, rounds=rounds, warmup=warmup)
        yield {"micro_batch": micro_size, **describe_outcomes(outcomes, micro_size)}
        if outcomes[OURS].out_of_memory:
            return
        references = {name: step for name, step in references.items() if not outcomes[name].out_of_memory}


def describe_outcomes(outcomes: dict[str, Outcome], micro_size: int) -> dict[str, Any]:
    """Return the sides as fields of a line: times, clips/s, loss, memory, and ours to theirs."""
    ours = outcomes[OURS]
    fields: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        fields[name] = {"out_of_memory": outcome.out_of_memory}
        if outcome.out_of_memory:
            continue
        median = statistics.median(outcome.seconds)
        fields[name] |= {
            "clips_per_s": round(micro_size / median, 4),
            **milliseconds(outcome.seconds),
            "loss": round(outcome.loss, 6),
            "step_gib": None if outcome.peak_gib is None else round(outcome.peak_gib, 4),
        }
        if name != OURS and not ours.out_of_memory:
            ratios = [a / b for a, b in zip(ours.seconds, outcome.seconds, strict=True)]
            fields[name]["ours_to_theirs"] = round(statistics.median(ratios), 4)
    return fields


def _sides(
    task: Task,
    references: dict[ReferenceName, OfficialStep],
    config: PretrainConfig,
    micro_size: int,
    device: torch.device,
    *,
    autocasts: bool,
) -> list[Side]:
    """Return ours and theirs on the same clips."""
    batch = synthetic_batch(task, config, micro_size, device, config.run.seed)
    inputs = task.inputs(batch, device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocasts, cache_enabled=False):
            loss: Tensor = task(*inputs)
        loss.backward()
        return float(loss.detach())

    sides = [Side(OURS, step, partial(task.zero_grad, set_to_none=True))]
    if references:
        videos_BCTHW = standardise(batch.clips_BCTHW)
        mask_BN = tube_mask(config, micro_size, device)
    for name, reference in references.items():
        take = partial(reference, videos_BCTHW, mask_BN)
        sides.append(Side(name, take, partial(reference.model.zero_grad, set_to_none=True)))
    return sides


def tube_mask(config: PretrainConfig, micro_size: int, device: torch.device) -> Tensor:
    """Return what VideoMAE hides, (B, N) bool: all but as many tubes as make a tenth of the tokens."""
    grid = config.grid
    places = count_places(grid, TUBE_VISIBLE)
    generator = torch.Generator(device).manual_seed(config.run.seed)
    noise_BJ = torch.rand(micro_size, grid.tokens_per_step, device=device, generator=generator)
    hidden_BJ = torch.ones_like(noise_BJ, dtype=torch.bool).scatter(1, noise_BJ.argsort(dim=1)[:, :places], False)
    return hidden_BJ.repeat(1, grid.time)
