"""Replayed micro-batches against eager ones.

Without a GPU, a tape replaces the graph: it repeats the captured operators on the same tensors without Python code.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from everest_ds.benchmark.steps.workbench import synthetic_batch
from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.errors import UserError
from everest_ds.recipes import get_recipe
from everest_ds.train.step.graph import CapturedCompute, Recording, capture_obstacle, record_graph, why_eager
from everest_ds.train.tasks import make_task

CLIPS, STEPS, LEARNING_RATE, CLASSES = 2, 4, 0.1, 8


class Tape(TorchDispatchMode):
    """Records operators, and repeats them with their results written into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage()._cdata not in given:
                    old.copy_(new)


def record_tape(compute: Any, buffers: tuple[Tensor, ...]) -> Recording:
    with Tape() as tape:
        loss = compute(*buffers)
    return Recording(replay=tape.replay, loss=loss, pool_bytes=7)


class Trained:
    """A task with plain in-place gradient steps; gradients are copied into buffers first, as in training."""

    def __init__(self, config: Config, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.task = make_task(config).to(device, dtype).train()
        self.weights = [p for p in self.task.parameters() if p.requires_grad]
        self.rows = [torch.zeros_like(weight) for weight in self.weights]
        self.device = torch.device(device)

    def compute(self, *inputs: Tensor) -> Tensor:
        loss: Tensor = self.task(*inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        torch._foreach_copy_(self.rows, [weight.grad for weight in self.weights])
        for weight in self.weights:
            weight.grad = None
        return loss.detach()

    def inputs(self, seed: int, clips: int = CLIPS) -> tuple[Tensor, ...]:
        return self.task.inputs(synthetic_batch(self.task, clips, self.device, seed), self.device)

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_add_(self.weights, self.rows, alpha=-LEARNING_RATE)

    def train(self, compute: Any) -> list[Tensor]:
        losses = []
        for step in range(STEPS):
            losses.append(compute(*self.inputs(step)))
            self.update()
        return losses


def demo(model: dict[str, Any] | None = None, *, finetune: bool = False, **selection: Any) -> Config:
    config = get_recipe("demo_ft" if finetune else "demo")
    if isinstance(config, FinetuneConfig):
        config = replace(config, data=replace(config.data, num_classes=CLASSES))
    return replace(
        config,
        data=replace(config.data, num_frames=8, image_size=32),  # type: ignore[arg-type]
        model=replace(config.model, **{"activation_checkpointing": False, **(model or {})}),  # type: ignore[arg-type]
        selection=replace(config.selection, **selection),  # type: ignore[arg-type]
    )


ALL_KINDS = {
    "pretrain": demo(),
    "frames chosen": demo(alpha=1.5),
    "checkpointing": demo({"activation_checkpointing": True}),
    "checkpointing but attention": demo({"activation_checkpointing": True, "recompute_attention": False}),
    "random": demo(strategy="random"),
    "running cells": demo(strategy="running_cell", selected_ratio=0.5),
    "finetune": demo({"drop_path": 0.3, "activation_checkpointing": True}, finetune=True),
    "frozen": demo({"freeze_encoder": True}, finetune=True),
}


def require_same_training(config: Config, device: str, dtype: torch.dtype, record: Any) -> CapturedCompute:
    """Train one task eagerly and another by replays; losses, weights and gradients must be bitwise identical."""
    eager, replayed = Trained(config, device, dtype), Trained(config, device, dtype)
    graph = CapturedCompute(replayed.compute, replayed.task, record=record)
    expected, found = eager.train(eager.compute), replayed.train(graph)
    assert graph.obstacle is None
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert len({float(loss) for loss in expected}) == STEPS
    for ours, theirs in zip((*replayed.weights, *replayed.rows), (*eager.weights, *eager.rows), strict=True):
        assert torch.equal(ours, theirs)
    assert replayed.task.visible_tokens == eager.task.visible_tokens > 0
    if config == ALL_KINDS["frames chosen"]:
        assert replayed.task.frame_choice is not None
        assert eager.task.frame_choice is not None
        for ours, theirs in zip(replayed.task.frame_choice, eager.task.frame_choice, strict=True):
            assert torch.equal(ours, theirs)
    return graph


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_replays_train_as_eager_steps_do(kind: str) -> None:
    graph = require_same_training(ALL_KINDS[kind], "cpu", torch.float32, record_tape)
    assert graph.pool_bytes == 7


def test_numbers_of_the_host_do_not_change_in_replays() -> None:
    """Shows that the tape would expose a step that depends on Python values."""
    trained, numbers = Trained(demo()), itertools.count(1)
    graph = CapturedCompute(
        lambda *inputs: trained.compute(*inputs) * next(numbers), trained.task, record=record_tape
    )
    first, second = (float(graph(*trained.inputs(0))) for _ in range(2))
    assert first == second


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_graphs_train_as_eager_steps_do_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    graph = require_same_training(ALL_KINDS[kind], "cuda", dtype, record_graph)
    assert graph.pool_bytes is not None
    assert graph.pool_bytes > 0
    assert graph.capture_s is not None


def test_what_evaluation_notes_in_between_does_not_stay() -> None:
    trained = Trained(ALL_KINDS["finetune"])
    graph = CapturedCompute(trained.compute, trained.task, record=record_tape)
    graph(*trained.inputs(0))
    expected = trained.task.visible_tokens
    trained.task.eval()
    trained.task(trained.inputs(0, clips=5)[0])
    assert trained.task.visible_tokens != expected
    trained.task.train()
    graph(*trained.inputs(1))
    assert trained.task.visible_tokens == expected


class Recorder:
    """Records tapes and counts them; with a ``fault`` it fails in the middle of backward."""

    def __init__(self, fault: BaseException | None = None) -> None:
        self.fault, self.count = fault, 0

    def __call__(self, compute: Any, buffers: tuple[Tensor, ...]) -> Recording:
        self.count += 1
        if self.fault is not None:
            compute.__self__.weights[0].grad = torch.ones_like(compute.__self__.weights[0])
            raise self.fault
        return record_tape(compute, buffers)


def take(trained: Trained, compute: Any, sizes: list[int]) -> list[float]:
    return [float(compute(*trained.inputs(step, clips))) for step, clips in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "captures", "gives_up"),
    [
        ([2, 2, 2], 1, False),
        ([2, 2, 3, 3, 3], 2, False),
        ([2, 2, 3, 3, 2, 2], 3, False),
        ([2, 3, 2, 3], 1, True),
        ([2, 2, 3, 2, 2], 2, True),
    ],
)
def test_other_shapes_are_captured_anew_unless_they_change_all_the_time(
    sizes: list[int], captures: int, gives_up: bool
) -> None:
    trained, recorder = Trained(demo()), Recorder()
    graph = CapturedCompute(trained.compute, trained.task, record=recorder)
    assert take(trained, graph, sizes) == take(trained, trained.compute, sizes)
    assert recorder.count == captures
    assert (graph.obstacle is not None) == gives_up
    if graph.obstacle is not None:
        assert "change from step to step" in graph.obstacle
        assert graph.pool_bytes is None


def test_inputs_of_another_dtype_are_captured_anew() -> None:
    """Targets are first labels, then shares of classes."""
    trained, recorder = Trained(ALL_KINDS["frozen"]), Recorder()
    graph = CapturedCompute(trained.compute, trained.task, record=recorder)
    clips, label_B, noise = trained.inputs(0)
    shares_BK = torch.nn.functional.one_hot(label_B, CLASSES).float()
    losses = [float(graph(clips, target, noise)) for target in (label_B, label_B, shares_BK, shares_BK)]
    assert losses == pytest.approx([losses[0]] * 4)
    assert recorder.count == 2


def test_weights_that_moved_are_captured_anew() -> None:
    trained, recorder = Trained(demo()), Recorder()
    graph = CapturedCompute(trained.compute, trained.task, record=recorder)
    take(trained, graph, [2, 2])
    moved = trained.weights[-1]
    moved.data = moved.data * 1.5
    assert take(trained, graph, [2, 2]) == take(trained, trained.compute, [2, 2])
    assert recorder.count == 2


def test_capture_that_fails_leaves_training_to_eager_steps() -> None:
    eager, trained, recorder = Trained(demo()), Trained(demo()), Recorder(RuntimeError("not\nallowed"))
    graph = CapturedCompute(trained.compute, trained.task, record=recorder)
    assert torch.equal(torch.stack(trained.train(graph)), torch.stack(eager.train(eager.compute)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained.weights, eager.weights, strict=True))
    assert graph.obstacle == "capture failed: RuntimeError: not"
    assert recorder.count == 1


def test_interrupt_during_a_capture_is_no_failure() -> None:
    trained = Trained(demo())
    graph = CapturedCompute(trained.compute, trained.task, record=Recorder(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        graph(*trained.inputs(0))
    assert graph.obstacle is None


@pytest.mark.gpu
def test_failed_capture_on_a_gpu_leaves_nothing_behind() -> None:
    """A step that synchronises cannot be captured; memory used by several streams is freed afterwards."""
    trained, eager = Trained(demo(), "cuda"), Trained(demo(), "cuda")

    def waiting(*inputs: Tensor) -> Tensor:
        loss = trained.compute(*inputs)
        assert loss.item() > 0
        return loss

    graph = CapturedCompute(waiting, trained.task)
    losses = trained.train(graph)
    assert graph.obstacle is not None
    assert graph.obstacle.startswith("capture failed")
    assert torch.equal(torch.stack(losses), torch.stack(eager.train(eager.compute)))
    other, held = torch.cuda.Stream(), torch.cuda.memory_allocated()
    for _ in range(3):
        shared = torch.empty(1 << 20, device="cuda")
        shared.record_stream(other)
        del shared
        torch.cuda.synchronize()
    torch.empty(1, device="cuda")  # makes the allocator process finished events
    assert torch.cuda.memory_allocated() <= held + 1024
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


SYSTEMS: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)},
    "offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "breakdown": {"zero_optimization": {"stage": 1}, "wall_clock_breakdown": True},
}
SELECTIONS: list[tuple[str, dict[str, Any]]] = [
    ("finetune", {}),
    *(("pretrain", {"budget": budget}) for budget in ("clip", "batch", "threshold")),
    ("pretrain", {"alpha": 1.5}),
    ("pretrain", {"strategy": "tube"}),
]


@pytest.mark.parametrize("asked", ["auto", "on", "off"])
def test_captures_where_nothing_stands_against_it(asked: Any) -> None:
    """Tries all combinations: `on` refuses the impossible ones, `auto` and `off` never refuse."""
    for device, systems, gradients, (task, selection) in itertools.product(
        ("cuda", "cpu"), SYSTEMS, ("auto", "flat", "deepspeed"), SELECTIONS
    ):
        config = demo({"cuda_graph": asked}, finetune=task == "finetune", **selection)
        config = replace(config, optim=replace(config.optim, gradients=gradients))  # type: ignore[arg-type]
        is_possible = (
            device == "cuda"
            and systems in ("zero0", "zero1", "zero2")
            and gradients != "deepspeed"
            and selection.get("budget", "clip") == "clip"
        )
        assert (capture_obstacle(config, SYSTEMS[systems], device) is None) == is_possible
        if asked == "on" and not is_possible:
            with pytest.raises(UserError, match=r"model\.cuda_graph=on is not available: .*model\.cuda_graph=auto"):
                why_eager(config, SYSTEMS[systems], device)
        else:
            why = why_eager(config, SYSTEMS[systems], device)
            assert (why is None) == (is_possible and asked != "off")
            assert asked != "off" or why == "model.cuda_graph=off"


@pytest.mark.parametrize(
    ("config", "systems", "device", "reason"),
    [
        (demo(), "zero2", "cpu", "it needs a CUDA device, got cpu"),
        (demo(budget="batch"), "zero2", "cuda", "selection.budget=batch changes the number of tokens"),
        (demo(), "zero3", "cuda", "it needs flat gradients, but gradients of ZeRO-3"),
        (demo(), "offload", "cuda", "it needs flat gradients, but offload_optimizer"),
    ],
)
def test_obstacle_is_named(config: Config, systems: str, device: str, reason: str) -> None:
    assert reason in (capture_obstacle(config, SYSTEMS[systems], device) or "")
    assert isinstance(config, PretrainConfig)
