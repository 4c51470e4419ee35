"""Gradients in one flat row per parameter group, at ZeRO-0, 1 and 2.

Place in the flow: backward of the bare task -> `collect` -> `reduce` -> AdamW on float32 masters -> `publish`.

    collect   one multi-tensor copy of a group's gradients into a row, laid out as the group's flat weights
    reduce    one reduce-scatter (ZeRO-0: all-reduce) of the row into this rank's part, a float32 mean
    publish   one copy of the masters into the rank's slice of the flat weights, one all-gather

DeepSpeed does the same for each parameter: a hook copies its gradient into a bucket, and norms, casts and views are
made one by one. DeepSpeed still manages partitions, masters, optimiser states and checkpoints, and its own path can
be selected (`optim.gradients=deepspeed`). At ZeRO-2 every micro-step is reduced and accumulated in the rank's part.
At ZeRO-0 and 1, micro-steps accumulate in a float32 row, which is reduced once a step. DeepSpeed does likewise,
except that it accumulates in bfloat16 at ZeRO-0 in bf16.

This module uses only the following attributes of DeepSpeed 0.19.8. If one is missing, the start is refused:

    engine          module, optimizer, gradient_accumulation_steps(), zero_optimization_stage(), micro_steps,
                    global_steps, global_samples, train_batch_size(), communication_data_type,
                    seq_data_parallel_group
    ZeRO-2, or 1    optimizer: optimizer, bit16_groups, bit16_groups_flat, single_partition_of_fp32_groups,
                    _grad_acc_hooks (removed here)
    ZeRO-1 in bf16  optimizer: optimizer, bf16_groups, bf16_groups_flat, fp32_groups_flat_partition,
                    fp32_groups_gradients_flat (its whole float32 gradients: accumulated in, or freed here),
                    bf16_partitioned_groups, _grad_acc_hooks (removed here)
    ZeRO-1 and 2    parameters: _hp_mapping.lp_fragment (detached here)
    ZeRO-0 in bf16  optimizer: optimizer, fp16_groups, fp32_groups (masters by parameter)
    ZeRO-0          optimizer: torch's own
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from everest_ds import distributed
from everest_ds.config import GradientsName
from everest_ds.errors import UserError

# Norms are computed over chunks, then over the chunks' norms. On a CPU, torch's norm of 3e8 float32 numbers is
# wrong by 4 %.
NORM_CHUNK = 4096
PROFILERS = ("flops_profiler", "comms_logger")
BREAKDOWNS = ("wall_clock_breakdown", "memory_breakdown")


def choose_gradients(asked: GradientsName, systems: dict[str, Any]) -> GradientsName:
    """Return flat or deepspeed.

    Args:
        asked: `optim.gradients`.
        systems: A DeepSpeed configuration, resolved or a file's.

    Raises:
        UserError: Flat gradients are asked for but not available.
    """
    obstacle = flat_obstacle(systems)
    if asked == "flat" and obstacle is not None:
        raise UserError(f"optim.gradients=flat is not available: {obstacle}; use optim.gradients=auto")
    if asked != "auto":
        return asked
    return "deepspeed" if obstacle else "flat"


def flat_obstacle(systems: dict[str, Any]) -> str | None:
    """Return why a DeepSpeed configuration needs DeepSpeed's own path for gradients, or None."""
    zero = systems.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 3:
        return "gradients of ZeRO-3 are partitioned by parameter"
    for section in ("offload_optimizer", "offload_param"):
        if (zero.get(section) or {}).get("device", "none") != "none":
            return f"{section} moves gradients to the host by parameter"
    if stage and systems.get("data_types", {}).get("grad_accum_dtype") == "bf16":
        return "data_types.grad_accum_dtype=bf16 accumulates in bfloat16, but flat gradients in float32"
    for section in PROFILERS:
        if systems.get(section, {}).get("enabled"):
            return f"{section} needs DeepSpeed's own path"
    return next((f"{key} needs DeepSpeed's own path" for key in BREAKDOWNS if systems.get(key)), None)


@dataclass(kw_only=True)
class GradientRow:
    """The gradients of one parameter group.

    Attributes:
        parameters: The model's parameters.
        row: Their gradients in a micro-step, (E,) in the parameters' dtype; E includes the padding of the weights.
        views: For each parameter, a view of its part of the row, in its shape.
        masters: The float32 weights that AdamW updates: the rank's part of the weights, or at ZeRO-0 each
            parameter.
        flat_weights: (E,), of which the parameters are views; None at ZeRO-0.
        total: The row accumulated over micro-steps, (E,) float32; None if every micro-step is reduced.
        part: The rank's part of the mean gradient, float32; None between the steps of ZeRO-1 and 2.
        master_gradients: At ZeRO-0, the piece of `part` for each master; empty otherwise.
    """

    parameters: list[Tensor]
    row: Tensor
    views: list[Tensor]
    masters: list[Tensor]
    flat_weights: Tensor | None = None
    total: Tensor | None = None
    part: Tensor | None = None
    master_gradients: list[Tensor] = field(default_factory=list)

    def collect(self) -> None:
        """Move the parameters' gradients into the row; a missing gradient counts as zeros."""
        gradients = [parameter.grad for parameter in self.parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        if len(present) == len(self.views):
            torch._foreach_copy_(self.views, present)
        else:
            for view, gradient in zip(self.views, gradients, strict=True):
                view.zero_() if gradient is None else view.copy_(gradient)
        for parameter in self.parameters:
            parameter.grad = None

    def hand_over(self) -> None:
        """Set the part as the gradients of the masters."""
        assert self.part is not None
        for master, gradient in zip(self.masters, self.master_gradients or [self.part], strict=True):
            master.grad = gradient

    def release(self) -> None:
        """Remove the gradients from the masters; a part of flat weights is freed."""
        for master in self.masters:
            master.grad = None
        if self.flat_weights is not None:
            self.part = None


class FlatGradients:
    """All gradients of an engine at ZeRO-0, 1 or 2; replaces the engine's own handling of gradients.

    Args:
        engine: The DeepSpeed engine around a task.

    Raises:
        UserError: This DeepSpeed stores its weights differently from 0.19.8.
    """

    def __init__(self, engine: Any) -> None:
        try:
            self._group: dist.ProcessGroup = engine.seq_data_parallel_group
            self._sent_as: torch.dtype = engine.communication_data_type
            self._stage = int(engine.zero_optimization_stage())
            self._accumulates = engine.gradient_accumulation_steps() > 1
            self._rank, self._world_size = dist.get_rank(self._group), dist.get_world_size(self._group)
            self.rows = _rows_of(engine.optimizer, self._stage, accumulates=self._accumulates)
        except AttributeError as error:
            raise UserError(_unknown_version(str(error))) from error
        for row in self.rows:
            share = len(row.row) // (1 if row.flat_weights is None else self._world_size)
            if sum(len(master.flatten()) for master in row.masters) != share:
                raise UserError(_unknown_version("its parts of the weights have unexpected sizes"))

    @torch.no_grad()
    def collect(self) -> None:
        """Copy the gradients of a backward pass into the rows; no collective and no synchronisation."""
        for row in self.rows:
            row.collect()

    @torch.no_grad()
    def reduce(self, *, first: bool, last: bool) -> None:
        """Reduce the rows of a micro-step over all ranks.

        Args:
            first: Whether it is the first micro-step of an optimiser step.
            last: Whether it is the last one; afterwards the parts are complete, as means over all ranks.
        """
        for row in self.rows:
            if row.total is None:
                self._reduce(row, row.row, first=first)
            else:
                _accumulate(row.total, row.row, first=first)
                if last:
                    self._reduce(row, row.total, first=True)
            if last and self._world_size > 1:
                assert row.part is not None
                row.part.div_(self._world_size)

    def norm(self) -> Tensor:
        """Return the norm over all gradients of all ranks, a float32 scalar on the device."""
        norms = torch.stack([chunked_norm(row.part) for row in self.rows if row.part is not None])
        if self._stage == 0 or self._world_size == 1:
            return torch.linalg.vector_norm(norms)
        square = norms.square().sum()
        dist.all_reduce(square, group=self._group)
        return square.sqrt()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the updated masters of all ranks into the model's weights."""
        for row in self.rows:
            if row.flat_weights is not None:
                own = row.flat_weights.chunk(self._world_size)[self._rank]
                own.copy_(row.masters[0])
                if self._world_size > 1:
                    distributed.all_gather_single(row.flat_weights, own, self._group)
            elif row.masters[0] is not row.parameters[0]:
                torch._foreach_copy_(row.parameters, row.masters)

    def _reduce(self, row: GradientRow, whole: Tensor, *, first: bool) -> None:
        """Reduce a row, or the total of several, over all ranks into the part."""
        sent = received = whole.to(self._sent_as)
        if self._world_size > 1 and self._stage == 0:
            dist.all_reduce(received, group=self._group)
        elif self._world_size > 1:
            received = torch.empty(len(sent) // self._world_size, dtype=sent.dtype, device=sent.device)
            distributed.reduce_scatter_single(received, sent, self._group)
        if row.part is None:  # copied, because the next micro-step overwrites the row
            row.part = received.to(torch.float32, copy=self._accumulates and received is row.row)
        else:
            _accumulate(row.part, received, first=first)


def chunked_norm(values: Tensor) -> Tensor:
    """Return the norm of (E,) float32 numbers, computed as the norm of the norms of its chunks."""
    chunks, rest = values.split([len(values) // NORM_CHUNK * NORM_CHUNK, len(values) % NORM_CHUNK])
    norms = torch.linalg.vector_norm(chunks.view(-1, NORM_CHUNK), dim=1)
    return torch.linalg.vector_norm(torch.cat([norms, torch.linalg.vector_norm(rest)[None]]))


def _accumulate(into: Tensor, new: Tensor, *, first: bool) -> None:
    if new is into:
        return
    if first:
        into.copy_(new)
    else:
        into.add_(new)


def _rows_of(optimizer: Any, stage: int, *, accumulates: bool) -> list[GradientRow]:
    """Return the rows of DeepSpeed's optimiser, and disable its own handling of gradients."""
    if stage == 0:
        rows = _rows_of_whole_weights(optimizer, accumulates=accumulates)
    elif hasattr(optimizer, "bf16_groups_flat"):
        rows = _flat_rows(optimizer.bf16_groups, optimizer.bf16_groups_flat, optimizer.fp32_groups_flat_partition)
        for row, gradients in zip(rows, optimizer.fp32_groups_gradients_flat, strict=True):
            if accumulates:
                row.total = gradients
            else:
                gradients.untyped_storage().resize_(0)
    else:
        masters = optimizer.single_partition_of_fp32_groups
        rows = _flat_rows(optimizer.bit16_groups, optimizer.bit16_groups_flat, masters)
        for row in rows:
            row.total = torch.zeros_like(row.row, dtype=torch.float32) if accumulates and stage == 1 else None
    for hook in optimizer._grad_acc_hooks if stage else ():
        hook.remove()
    _free_from_autograd(optimizer, rows)
    return rows


def _free_from_autograd(optimizer: Any, rows: Sequence[GradientRow]) -> None:
    """Detach DeepSpeed's views of weights, and flat weights that it built with gradient.

    Such a view keeps alive the autograd node that accumulates a weight's gradient. That node runs on the stream
    that was current when the view was made, but a CUDA graph must be captured on one stream.
    """
    for parameter in (parameter for row in rows for parameter in row.parameters):
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            mapping.lp_fragment = mapping.lp_fragment.detach()
    if hasattr(optimizer, "bf16_groups_flat"):
        optimizer.bf16_groups_flat[:] = [weights.detach() for weights in optimizer.bf16_groups_flat]
        optimizer.bf16_partitioned_groups[:] = [
            [part.detach() for part in parts] for parts in optimizer.bf16_partitioned_groups
        ]


def _flat_rows(
    groups: Sequence[list[Tensor]], flat_weights: Sequence[Tensor], masters: Sequence[Tensor]
) -> list[GradientRow]:
    """Return rows with the layout of flat weights; each rank's part has one master."""
    rows = []
    for parameters, weights, master in zip(groups, flat_weights, masters, strict=True):
        row = torch.zeros_like(weights)
        starts = [(p.data_ptr() - weights.data_ptr()) // p.element_size() for p in parameters]
        rows.append(
            GradientRow(
                parameters=parameters,
                row=row,
                views=_views(row, parameters, starts),
                masters=[master],
                flat_weights=weights.detach(),
            )
        )
    return rows


def _rows_of_whole_weights(optimizer: Any, *, accumulates: bool) -> list[GradientRow]:
    """Return rows of ZeRO-0, where every rank has and updates all weights."""
    rows, bare = [], getattr(optimizer, "optimizer", optimizer)
    groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in bare.param_groups]
    for parameters, group in zip(groups, bare.param_groups, strict=True):
        first, starts = parameters[0], [0]
        for parameter in parameters:
            starts.append(starts[-1] + parameter.numel())
        row = torch.zeros(starts.pop(), dtype=first.dtype, device=first.device)
        total = torch.zeros_like(row, dtype=torch.float32) if accumulates else None
        part = row.float() if total is None else total
        rows.append(
            GradientRow(
                parameters=parameters,
                row=row,
                views=_views(row, parameters, starts),
                masters=group["params"],
                total=total,
                part=part,
                master_gradients=_views(part, parameters, starts),
            )
        )
    return rows


def _views(row: Tensor, parameters: Sequence[Tensor], starts: Sequence[int]) -> list[Tensor]:
    return [row[start:][: p.numel()].view_as(p) for p, start in zip(parameters, starts, strict=True)]


def _unknown_version(why: str) -> str:
    from deepspeed import __version__

    return (
        f"optim.gradients=flat does not support DeepSpeed {__version__} ({why}); use DeepSpeed 0.19.8 or "
        "optim.gradients=deepspeed"
    )
