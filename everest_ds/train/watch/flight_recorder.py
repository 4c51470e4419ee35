"""torch's record of this process's last collectives: with NCCL, and in newer versions of torch also with gloo."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from everest_ds.files import parse_json


def recorded() -> bytes:
    """Return the record as JSON; empty if there is none."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump: Callable[[bool, bool], bytes | str] | None = getattr(torch._C._distributed_c10d, name, None)
        if dump is None:
            continue
        trace = dump(True, False)
        trace = trace.encode() if isinstance(trace, str) else trace
        if parse_json(trace).get("entries"):
            return trace
    return b""


def num_queued() -> int | None:
    """Return how many collectives this process has queued, over all groups; None if they are not recorded."""
    trace = recorded()
    return count_queued(parse_json(trace)) if trace else None


def count_queued(trace: Mapping[str, Any]) -> int:
    """Return the sum, over the groups in a record, of the number of their last collective."""
    last: dict[Any, int] = {}
    for entry in trace.get("entries", ()):
        if not entry.get("is_p2p"):
            group = entry.get("pg_id")
            last[group] = max(last.get(group, 0), int(entry.get("collective_seq_id", 0)))
    return sum(last.values())
