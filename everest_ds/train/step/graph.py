"""Forward and backward of a micro-batch, captured once as a CUDA graph and then replayed.

Place in the flow: inputs on the device -> `CapturedCompute` -> loss, and gradients where `compute` puts them.

A step launches thousands of kernels. With few clips, the host launches them more slowly than the GPU runs them.
A graph is one launch. It repeats the captured kernels with their shapes and addresses, so these must not change:

    inputs      copied into fixed buffers; another shape of micro-batch is captured again and replaces the graph
    weights     changed in place by the optimiser, the all-gather and `WeightAverage.swapped`; if one has moved
                anyway, the step is captured again
    gradients   copied by `compute` into fixed rows (`train.step.gradients`)
    loss        in the graph's memory; copied after each replay
    task        runs only at capture; the attributes that its forward pass set are set again after each replay
    randomness  none: noise is one of the inputs

The graph has its own memory pool for forward and backward, which stays reserved between steps. Evaluation runs
eagerly, outside the pool.
"""

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everest_ds.config import Config, PretrainConfig
from everest_ds.errors import UserError
from everest_ds.model.frames import FrameChoice
from everest_ds.train.step.device_feed import Inputs
from everest_ds.train.step.gradients import flat_obstacle
from everest_ds.train.tasks import Task

Compute = Callable[..., Tensor]
"""Takes the inputs of a micro-batch and returns its loss, detached; puts gradients at fixed addresses."""
# Eager runs before a capture, in which libraries load kernels, choose algorithms and allocate workspaces.
WARM_UP = 2
# A graph that is replaced after fewer replays costs more than it saves.
LEAST_REPLAYS = 2


def why_eager(config: Config, ds_config: dict[str, Any], device_type: str) -> str | None:
    """Return why steps are not captured, or None if they are.

    Args:
        config: The run.
        ds_config: Its DeepSpeed configuration, resolved or a file's.
        device_type: cuda or cpu.

    Raises:
        UserError: model.cuda_graph=on, and capture is not possible.
    """
    if config.model.cuda_graph == "off":
        return "model.cuda_graph=off"
    obstacle = capture_obstacle(config, ds_config, device_type)
    if obstacle is not None and config.model.cuda_graph == "on":
        raise UserError(f"model.cuda_graph=on is not available: {obstacle}; use model.cuda_graph=auto")
    return obstacle


def capture_obstacle(config: Config, ds_config: dict[str, Any], device_type: str) -> str | None:
    """Return why forward and backward of a run cannot be one CUDA graph, or None; arguments as for `why_eager`."""
    if device_type != "cuda":
        return f"it needs a CUDA device, got {device_type}"
    if isinstance(config, PretrainConfig) and config.selection.varies:
        return f"selection.budget={config.selection.budget} changes the number of tokens from step to step"
    if config.optim.gradients == "deepspeed":
        return "it needs flat gradients, but optim.gradients=deepspeed"
    obstacle = flat_obstacle(ds_config)
    return None if obstacle is None else f"it needs flat gradients, but {obstacle}"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A captured computation.

    Attributes:
        replay: Repeats it on the current contents of the buffers.
        loss: A scalar that every replay overwrites.
        pool_bytes: Device memory reserved for it, besides buffers, weights and gradients.
    """

    replay: Callable[[], None]
    loss: Tensor
    pool_bytes: int


def record_graph(compute: Compute, buffers: Inputs) -> Recording:
    """Capture ``compute(*buffers)`` as a CUDA graph.

    Raises:
        Exception: The error of torch or the driver, if the computation cannot be captured. Nothing is captured
            then, and the caller's stream is current again.
    """
    device = buffers[0].device
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            compute(*buffers)
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(device)
        # Other threads (NCCL's watchdog, pinned memory) may continue to make calls that a capture forbids.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            loss = compute(*buffers)
        except BaseException:
            with suppress(RuntimeError):  # the driver has invalidated the capture
                graph.capture_end()
            _release(device, pool)
            raise
        try:
            graph.capture_end()
        except BaseException:
            _release(device, pool)
            raise
    torch.cuda.current_stream(device).wait_stream(stream)
    pool_bytes = torch.cuda.memory_reserved(device) - reserved
    return Recording(replay=graph.replay, loss=loss, pool_bytes=pool_bytes)


def _release(device: torch.device, pool: Any) -> None:
    """Tell the allocator that a capture has failed.

    If the driver invalidates a capture, the allocator of torch 2.14 still treats it as in progress. Memory that
    several streams have used would then never be freed.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(AttributeError, RuntimeError):  # the capture has ended properly
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)


@dataclass(kw_only=True)
class _Captured:
    """A recording, the shapes and addresses that it is valid for, and the task's attributes at capture."""

    key: tuple[Any, ...]
    buffers: Inputs
    recording: Recording
    visible_tokens: int
    frame_choice: FrameChoice | None
    replays: int = 0


class CapturedCompute:
    """Computes loss and gradients of micro-batches by replaying a graph, captured at the first micro-batch.

    If a capture fails, or new graphs are needed too often, it computes eagerly from then on. Losses and gradients
    are always those of eager steps.

    Args:
        compute: Computes loss and gradients of a micro-batch; does not communicate, and leaves no ``grad``.
        task: The task that ``compute`` runs.
        record: Captures a computation; tests without a GPU replace it.

    Attributes:
        obstacle: Why it computes eagerly, or None.
        pool_bytes: Memory reserved for the graph; None without one.
        capture_s: Seconds that the capture took.
    """

    def __init__(
        self, compute: Compute, task: Task, *, record: Callable[[Compute, Inputs], Recording] = record_graph
    ) -> None:
        self._compute, self._task, self._record = compute, task, record
        self._weights = [*task.parameters(), *task.buffers()]
        self._captured: _Captured | None = None
        self.obstacle: str | None = None
        self.pool_bytes: int | None = None
        self.capture_s: float | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the loss of a micro-batch, a scalar that no later call changes; see `Compute`."""
        if self.obstacle is None:
            key = (
                tuple((x.shape, x.dtype, x.device) for x in inputs),
                tuple(weight.data_ptr() for weight in self._weights),
            )
            if self._captured is None or self._captured.key != key:
                self._capture(inputs, key)
        if self._captured is None:
            return self._compute(*inputs)
        return self._replay(self._captured, inputs)

    def _capture(self, inputs: Inputs, key: tuple[Any, ...]) -> None:
        before, self._captured = self._captured, None
        if before is not None and before.replays < LEAST_REPLAYS:
            self._give_up("shapes of micro-batches or addresses of weights change from step to step")
            return
        del before  # frees its memory for the next graph
        began = time.perf_counter()
        try:
            buffers = tuple(x.clone() for x in inputs)
            recording = self._record(self._compute, buffers)
        except Exception as error:
            self._give_up(f"capture failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            return
        self.capture_s, self.pool_bytes = time.perf_counter() - began, recording.pool_bytes
        self._captured = _Captured(
            key=key,
            buffers=buffers,
            recording=recording,
            visible_tokens=self._task.visible_tokens,
            frame_choice=self._task.frame_choice,
        )

    def _give_up(self, why: str) -> None:
        self.obstacle, self.pool_bytes = why, None
        for parameter in self._task.parameters():
            parameter.grad = None  # left by a backward pass that did not complete

    def _replay(self, captured: _Captured, inputs: Inputs) -> Tensor:
        for buffer, given in zip(captured.buffers, inputs, strict=True):
            buffer.copy_(given)
        captured.recording.replay()
        captured.replays += 1
        self._task.visible_tokens, self._task.frame_choice = captured.visible_tokens, captured.frame_choice
        return captured.recording.loss.clone()
