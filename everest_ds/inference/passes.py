"""Forward passes over a list: each row once, on any number of processes.

Place in the flow: rows -> `ViewDataset` -> groups of rows -> one forward pass a group -> one result a row. Groups
do not depend on the number of processes: every pass has the same clips in the same order, so results are bitwise
identical. Axes: B clips of a pass, V views of a row, C T H W of a clip, X values that are computed from a clip.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from everest_ds import distributed
from everest_ds.config import FinetuneDataConfig
from everest_ds.data.clips.views import RowViews, ViewDataset, make_view_loader
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.progress import Progress

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class UnreadableRow:
    """A row whose video could not be read."""

    row: int
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class RowResults(Generic[T]):
    """The results of a list.

    Attributes:
        results: Results of the readable rows by row number, in row order.
        unreadable: The unreadable rows, in row order.
    """

    results: dict[int, T]
    unreadable: tuple[UnreadableRow, ...]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Settings of forward passes over a list.

    Attributes:
        group_size: Rows of one forward pass. It changes the last bits of results; the other fields do not.
        world: The ranks.
        device: Device of the passes.
        allow_unreadable: List unreadable rows instead of raising an error.
        same_rounds: Let every rank do the same number of passes. ZeRO-3 needs this, because all ranks gather each
            layer's weights together. A rank without a readable row runs a blank clip and drops the result.
    """

    group_size: int
    world: World
    device: torch.device
    allow_unreadable: bool = False
    same_rounds: bool = False

    def map(
        self,
        compute: Callable[[Tensor], Tensor],
        reduce: Callable[[RowViews, Tensor], T],
        dataset: ViewDataset,
        *,
        progress: str | None = None,
    ) -> RowResults[T]:
        """Compute a result for every row. All ranks must call it, and all get the results of all rows.

        Args:
            compute: clips_BCTHW uint8 on the device -> (B, X); called without gradient. The caller puts its model
                into evaluation mode.
            reduce: A row and its values (V, X), on the CPU in the dtype of ``compute`` -> the row's result.
            dataset: The rows and their views.
            progress: Words for progress lines; None prints nothing.

        Raises:
            UserError: A video cannot be read; raised on the rank that reads it.
        """
        starts = range(0, len(dataset), self.group_size)
        groups = [range(start, min(start + self.group_size, len(dataset))) for start in starts]
        mine = groups[self.world.rank :: self.world.size]
        loader = make_view_loader(dataset, mine, pin_memory=self.device.type == "cuda")
        shown = Progress(len(dataset), progress or "")
        results: dict[int, T] = {}
        unreadable: list[UnreadableRow] = []
        with torch.no_grad(), contextlib.closing(iter(loader)) as each_group:
            for done, group in enumerate(each_group, start=1):
                unreadable += [self._report(dataset, row) for row in group if row.bad is not None]
                values = _run(compute, group, self.device)
                if not values and self.same_rounds:
                    compute(_blank(dataset.config, self.device))
                results |= {row.index: reduce(row, values_VX) for row, values_VX in values}
                if progress and self.world.is_main:  # every rank has its share of the groups
                    shown.show(round(done / len(mine) * len(dataset)))
            if self.same_rounds and len(mine) < -(-len(groups) // self.world.size):
                compute(_blank(dataset.config, self.device))
        everyone = distributed.gather_objects((results, unreadable))
        merged = {index: result for part, _ in everyone for index, result in part.items()}
        return RowResults(
            results={index: merged[index] for index in sorted(merged)},
            unreadable=tuple(sorted((bad for _, part in everyone for bad in part), key=lambda bad: bad.row)),
        )

    def _report(self, dataset: ViewDataset, row: RowViews) -> UnreadableRow:
        bad = UnreadableRow(row=row.index, path=str(dataset.rows[row.index].path), reason=row.bad or "")
        if not self.allow_unreadable:
            raise UserError(
                f"{bad.path} (row {bad.row}) cannot be read: {bad.reason}. Repair it, remove it from the list, or "
                "give --allow-unreadable: unreadable videos are then left out and counted"
            )
        return bad


def _run(
    compute: Callable[[Tensor], Tensor], group: Sequence[RowViews], device: torch.device
) -> list[tuple[RowViews, Tensor]]:
    """Compute the readable rows of a group in one pass; returns each row with its values (V, X) on the CPU."""
    pairs = [(row, row.clips_VCTHW) for row in group if row.clips_VCTHW is not None]
    if not pairs:
        return []
    clips_BCTHW = torch.cat([clips_VCTHW.to(device, non_blocking=True) for _, clips_VCTHW in pairs])
    values_BX = compute(clips_BCTHW).cpu()
    views = [len(clips_VCTHW) for _, clips_VCTHW in pairs]
    return list(zip([row for row, _ in pairs], values_BX.split(views), strict=True))


def _blank(data: FinetuneDataConfig, device: torch.device) -> Tensor:
    """Return one black clip."""
    shape = (1, 3, data.num_frames, data.image_size, data.image_size)
    return torch.zeros(shape, dtype=torch.uint8, device=device)
