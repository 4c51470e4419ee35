"""Flat gradients against DeepSpeed's own path, step by step; run by test_gradients.py.

Arguments: `STEPS CASE...`. A case is STAGE,PRECISION,KIND; KINDS lists the options of each kind of run. Rank zero
reports one line a case: losses and gradient norms of both paths, and the largest final difference of any weight or
optimiser state on any rank.
"""

import functools
import sys
from dataclasses import replace
from typing import Any, cast

import torch

from everest_ds import distributed
from everest_ds.config import BatchConfig, Config, FinetuneConfig, GradientsName, PretrainConfig
from everest_ds.recipes import get_recipe
from everest_ds.train import engine as engines
from everest_ds.train.ema import WeightAverage
from everest_ds.train.precision import PrecisionName
from everest_ds.train.step.updater import make_updater
from everest_ds.train.tasks import Task, make_task
from tests.conftest import REPOSITORY
from tests.integration.scanning import report, run_scan

EDGE, FRAMES, CLASSES, LEARNING_RATE = 32, 4, 5, 1e-3
# Micro-batches a step, the clipping norm, and whether one step gets a non-finite gradient.
KINDS = {
    "plain": (1, 0.0, False),
    "accumulation": (3, 0.0, False),
    "clipping": (1, 0.05, False),
    "skipping": (2, 0.0, True),
    "finetune": (2, 0.0, False),  # layer decay: a group for each layer; and a moving average
    "frozen": (1, 0.0, False),
}
SPOILED_STEP = 2


def make_config(kind: str, world_size: int) -> Config:
    """A run of the demo's model with one clip a micro-batch."""
    accumulation, max_norm, _ = KINDS[kind]
    batch = BatchConfig(global_size=accumulation * world_size, micro_size=1)
    if kind in ("finetune", "frozen"):
        config = get_recipe("demo_ft")
        assert isinstance(config, FinetuneConfig)
        return replace(
            config,
            data=replace(config.data, num_frames=FRAMES, image_size=EDGE, num_classes=CLASSES),
            model=replace(config.model, freeze_encoder=kind == "frozen"),
            optim=replace(config.optim, layer_decay=1.0 if kind == "frozen" else 0.7, max_grad_norm=max_norm),
            batch=batch,
        )
    pretrain = get_recipe("demo")
    assert isinstance(pretrain, PretrainConfig)
    return replace(
        pretrain,
        data=replace(pretrain.data, num_frames=FRAMES, image_size=EDGE),
        optim=replace(pretrain.optim, max_grad_norm=max_norm),
        batch=batch,
    )


class Side:
    """One of the two runs."""

    def __init__(
        self, config: Config, ds_config: dict[str, Any], device: torch.device, gradients: GradientsName
    ) -> None:
        torch.manual_seed(0)
        self.task = make_task(config)
        self.engine = engines.build_engine(self.task, config, ds_config, device)
        self.engine.train()
        self.average = WeightAverage(self.engine, 0.9) if isinstance(config, FinetuneConfig) else None
        self.updater = make_updater(self.engine, replace(config.optim, gradients=gradients), ds_config)
        self.addresses = self.find_addresses()
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, micro_batches: list[tuple[torch.Tensor, ...]], *, spoiled: bool) -> None:
        engines.set_learning_rate(self.engine, LEARNING_RATE)
        spoiler = None
        if spoiled:
            weight = next(p for p in self.task.parameters() if p.requires_grad)
            spoiler = weight.register_hook(lambda gradient: gradient * float("nan"))
        for inputs in micro_batches:
            self.losses.append(self.updater.forward_backward(inputs).item())
            result = self.updater.step()
        if spoiler is not None:
            spoiler.remove()
        assert result is not None
        self.norms.append(float(result.grad_norm) if result.applied else -1.0)
        if self.average is not None:
            self.average.update(result.applied)

    def find_addresses(self) -> list[int]:
        """Addresses at which a captured graph reads the weights."""
        return [weight.data_ptr() for weight in self.task.parameters()]

    def stays_in_place(self) -> tuple[bool, int]:
        """Whether all weights kept their addresses, and how many still have an autograd node.

        An autograd node that outlives its pass would also belong to the stream of an eager step.
        """
        if self.average is not None:
            with self.average.swapped():
                pass
        kept = [weight for weight in self.task.parameters() if weight.requires_grad and _has_node(weight)]
        return self.addresses == self.find_addresses(), len(kept)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights, averages and all optimiser states of this rank."""
        found = {f"weight {name}": p.detach() for name, p in self.engine.module.named_parameters()}
        if self.average is not None:
            found |= {f"average {name}": tensor for name, tensor in self.average.whole()}
        bare = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        for number, group in enumerate(bare.param_groups):
            for index, master in enumerate(group["params"]):
                found[f"master {number} {index}"] = master.detach()
                found |= {f"{key} {number} {index}": value for key, value in bare.state[master].items()}
        return found


def _has_node(weight: torch.Tensor) -> bool:
    """Return whether a weight's gradient accumulator is still alive: a new one has no mark."""

    def node() -> Any:
        return weight.expand_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    node().metadata["seen"] = True
    return "seen" in node().metadata


def make_inputs(config: Config, task: Task, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    clips = torch.randint(0, 256, (1, 3, FRAMES, EDGE, EDGE), dtype=torch.uint8, generator=generator)
    if isinstance(config, PretrainConfig):
        return clips, torch.rand(1, config.num_selected, generator=generator)
    label = torch.randint(0, CLASSES, (1,), generator=generator)
    return clips, label, torch.rand(1, task.model.num_noise(config.grid), generator=generator)  # type: ignore[union-attr]


def run_case(case: str, steps: int, world: distributed.World, device: torch.device) -> None:
    stage, precision, kind = case.split(",")
    config = make_config(kind, world.size)
    systems = engines.load_systems(REPOSITORY / "ds_configs" / f"zero{stage}.json")
    ds_config = engines.resolve_ds_config(
        systems, config, world_size=world.size, precision=cast(PrecisionName, precision), device_type="cpu"
    )
    sides = [Side(config, ds_config, device, "deepspeed"), Side(config, ds_config, device, "flat")]
    generator = torch.Generator().manual_seed(world.rank)
    for step in range(steps):
        batches = [make_inputs(config, sides[0].task, generator) for _ in range(KINDS[kind][0])]
        for side in sides:
            side.step(batches, spoiled=KINDS[kind][2] and step == SPOILED_STEP)
    in_place = sides[1].stays_in_place()
    own, flat = (side.tensors() for side in sides)
    assert own.keys() == flat.keys()
    worst = max(float((own[name].double() - flat[name].double()).abs().max()) for name in own)
    everyone = distributed.gather_objects(([side.losses for side in sides], worst))
    counters = [[side.engine.global_steps, side.engine.micro_steps, side.engine.global_samples] for side in sides]
    for side in sides:
        side.engine.destroy()
    if world.is_main:
        report(
            case=case,
            losses=[[losses[path] for losses, _ in everyone] for path in range(2)],
            norms=[side.norms for side in sides],
            worst=max(worst for _, worst in everyone),
            counters=counters,
            in_place=in_place,
        )


def sum_in_rank_order() -> None:
    """Sum in the order of ranks, independent of an element's position in the tensor.

    Gloo sums a tensor in pieces, each in its own order. Sums of more than two numbers are therefore rounded
    differently if tensors are packed differently.
    """
    dist = torch.distributed
    gloos = dist.all_reduce

    def total_of(tensor: torch.Tensor, group: Any) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return functools.reduce(torch.add, parts)

    def all_reduce(
        tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if op != dist.ReduceOp.SUM:
            return gloos(tensor, op, group, async_op)
        assert not async_op
        return tensor.copy_(total_of(tensor, group))

    def reduce(tensor: torch.Tensor, dst: int, op: Any = dist.ReduceOp.SUM, group: Any = None, **_: Any) -> None:
        all_reduce(tensor, op, group)

    def reduce_scatter(part: torch.Tensor, whole: torch.Tensor, group: Any) -> None:
        part.copy_(total_of(whole, group).chunk(dist.get_world_size(group))[dist.get_rank(group)])

    dist.all_reduce, dist.reduce = all_reduce, reduce
    distributed.reduce_scatter_single = reduce_scatter


def main(world: distributed.World, device: torch.device) -> None:
    """Run all cases."""
    sum_in_rank_order()
    for case in sys.argv[2:]:
        run_case(case, int(sys.argv[1]), world, device)


if __name__ == "__main__":
    run_scan(main)
