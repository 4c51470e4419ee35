"""From the configuration to the model's selection: rules, and budgets that all processes share.

Place in the flow: importance_BN of this rank's clips -> (that of all ranks) -> counts of this rank's clips. The
clips of a micro-batch compete across all ranks, so two ranks with half of them each select what one rank with all
of them would. Axes: B clips, N tokens of a clip.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from everest_ds import distributed
from everest_ds.config import PretrainConfig
from everest_ds.model.budgets import ClipBudget, count_above, share_budget, upper_quantile
from everest_ds.model.selection import SelectionRule
from everest_ds.tokens import ClipCounts, noise_length


def pretrain_rule(config: PretrainConfig) -> SelectionRule:
    """Return which tokens and frames a pre-training run keeps."""
    selection = config.selection
    return SelectionRule(
        strategy=selection.strategy,
        order=selection.order,
        distance=selection.distance,
        selected_ratio=selection.selected_ratio,
        visible_ratio=selection.visible_ratio,
        targets=selection.targets,
        num_steps=config.grid.time if config.candidate_steps > config.grid.time else None,
    )


def num_pretrain_noise(config: PretrainConfig) -> int:
    """Return how many uniform noise values each clip of a pre-training run needs."""
    candidates = config.candidate_steps if config.candidate_steps > config.grid.time else 0
    return noise_length(config.selection.strategy, config.grid, config.most.selected, candidates)


class Budget:
    """Computes how many tokens each clip of a micro-batch keeps, if clips differ; all ranks take part.

    Attributes:
        threshold: The running quantile of importance, a float32 scalar on the device; None before the first
            micro-batch. The same on all ranks; saved in checkpoints.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.threshold: Tensor | None = None
        self.clip = ClipBudget(
            average=config.counts,
            least=config.least_selected,
            most=config.most.selected,
            targets=config.selection.targets,
        )

    def __call__(self, importance: Sequence[Tensor], noise: Sequence[Tensor]) -> list[list[ClipCounts]]:
        """Return the counts of this rank's clips, see `EverestAutoencoder.forward`; noise breaks ties."""
        (own_BN,), (noise_BS,) = importance, noise
        score_BN = own_BN if self.config.selection.order == "descending" else -own_BN
        all_BN = distributed.gather_rows(score_BN)
        if self.config.selection.budget == "batch":
            draw_B = distributed.gather_rows(noise_BS[:, 0].contiguous())
            (everyone,) = share_budget([all_BN], [draw_B], [self.clip])
            first = distributed.rank() * len(own_BN)
            return [everyone[first : first + len(own_BN)]]
        now = upper_quantile([all_BN], [self.clip])
        decay = self.config.selection.quantile_decay
        before = now if self.threshold is None else self.threshold.to(now.device)
        self.threshold = decay * before + (1 - decay) * now
        return [count_above(score_BN, self.threshold, self.clip)]


def share_of_loss(num_targets: int, device: torch.device) -> Tensor:
    """Return the weight of a rank's mean loss, so that the mean over ranks is the mean over all target tokens.

    It is the rank's share of the target tokens of this micro-batch, times the number of ranks. It does not
    synchronise with the device.
    """
    own = torch.full((), float(num_targets), device=device)
    return own * distributed.world_size() / distributed.sum_of(own)
