"""Records when a run captures its step as a CUDA graph, and when it falls back to eager steps.

An event `cuda_graph` of metrics.jsonl, after the step in which it happened:

    obstacle     why steps are eager from here on, or null
    pool_gib     memory that the graph keeps reserved, or null
    capture_s    seconds that warm-up and capture took, or null
"""

import sys
from collections.abc import Sequence

from torch import Tensor

from everest_ds.distributed import World, speaks_first
from everest_ds.errors import escaped
from everest_ds.train.callbacks import Callback
from everest_ds.train.record.metrics import MetricsLog
from everest_ds.train.step.graph import CapturedCompute
from everest_ds.train.step.updater import StepResult


class CaptureLog(Callback):
    """Writes and prints whether a graph was captured; an obstacle on any rank is printed once per machine.

    Args:
        log: The record.
        graph: Captures and replays the graph.
        world: This rank.
    """

    def __init__(self, log: MetricsLog, graph: CapturedCompute, world: World) -> None:
        self._log, self._graph, self._world = log, graph, world
        self._known: tuple[str | None, int | None] = (None, None)

    def on_step(self, step: int, losses: Sequence[Tensor], result: StepResult) -> None:
        """Report a change since the previous step."""
        graph = self._graph
        now = graph.obstacle, graph.pool_bytes
        if now == self._known:
            return
        self._known = now
        pool_gib = None if graph.pool_bytes is None else round(graph.pool_bytes / 2**30, 3)
        capture_s = None if graph.capture_s is None else round(graph.capture_s, 2)
        if graph.obstacle is None:
            self._log.say(f"captured a CUDA graph in {capture_s} s; it keeps {pool_gib} GiB reserved")
        elif speaks_first(f"eager {graph.obstacle}", self._world):
            text = f"warning: no CUDA graph, steps are computed eagerly: {graph.obstacle}"
            print(escaped(text), file=sys.stderr, flush=True)  # other ranks have no stdout
        self._log.write(
            "event", step, event="cuda_graph", obstacle=graph.obstacle, pool_gib=pool_gib, capture_s=capture_s
        )
