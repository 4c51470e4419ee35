"""Describe the important events of metrics.jsonl in words."""

from collections.abc import Callable, Mapping
from typing import Any

from everest_ds.train.record.stored.measurements import Measurements
from everest_ds.train.record.stored.texts import moment_of, text_of

_MOST = 40
_SHOWN_VIDEOS = 3
_ELSEWHERE = ("slow_rank", "memory", "checkpoint")
"""Events that other parts of the report describe."""

Event = Mapping[str, Any]


def describe_events(record: Measurements) -> list[tuple[str, int, str]]:
    """Return time, step and text of the events in order.

    Only the first and last events of a long list are returned, with a row that counts the others.
    """
    known = [line for line in record.events() if isinstance(line.get("event"), str) and line["event"] in _TEXTS]
    rows = [(moment_of(line.get("time_s")), line["step"], _TEXTS[line["event"]](line)) for line in known]
    num_left_out = len(rows) - _MOST
    if num_left_out > 0:
        rows = rows[: _MOST // 2] + rows[-_MOST // 2 :]
    for rank, (count, worst) in sorted(record.slow.items()):
        rows.append(
            ("", record.last_step, f"rank {rank} was slow {count} times, at worst {worst:.2f} times its peers")
        )
    counted = {name: count for name, count in record.num_events.items() if name not in (*_TEXTS, *_ELSEWHERE)}
    hidden = sum(record.num_events[name] for name in _TEXTS) - len(known) + max(0, num_left_out)
    if hidden > 0:
        rows.append(("", record.last_step, f"{hidden} more events of these kinds"))
    if counted:
        named = ", ".join(f"{name} {count}" for name, count in sorted(counted.items())[:20])
        rows.append(("", record.last_step, f"also recorded: {named}"))
    return rows


def _begin(line: Event) -> str:
    what = "resumed" if line["event"] == "resume" else "started"
    start_of = line.get("init_from")
    source = "" if start_of is None else f", from the weights of {text_of(start_of)}"
    processes = "1 process" if line.get("world_size") == 1 else f"{text_of(line.get('world_size'))} processes"
    return f"{what} on {processes}, ZeRO-{text_of(line.get('zero_stage'))}{source}"


def _skipped(line: Event) -> str:
    samples = line.get("samples")
    ranks = samples if isinstance(samples, dict) else {}
    paths = [text_of(path) for listed in ranks.values() if isinstance(listed, list) for path in listed]
    shown = ", ".join(paths[:_SHOWN_VIDEOS]) + (
        f" and {len(paths) - _SHOWN_VIDEOS} more" if len(paths) > _SHOWN_VIDEOS else ""
    )
    return f"step skipped, number {text_of(line.get('num_skipped'))}: a gradient was not finite; videos: {shown}"


def _graph(line: Event) -> str:
    obstacle = line.get("obstacle")
    if obstacle is not None:
        return f"no CUDA graph from here on: {text_of(obstacle)}"
    return (
        f"CUDA graph captured in {text_of(line.get('capture_s'))} s, {text_of(line.get('pool_gib'))} GiB reserved"
    )


_TEXTS: dict[str, Callable[[Event], str]] = {
    "start": _begin,
    "resume": _begin,
    "first_step": lambda line: f"first step {text_of(line.get('total_s'))} s after the start of the process",
    "skipped_step": _skipped,
    "hang": lambda line: f"hung: ranks {text_of(line.get('ranks'))}; {text_of(line.get('why'))}",
    "weights_differ": lambda line: f"weights of ranks {text_of(line.get('ranks'))} differed from the others'",
    "cuda_graph": _graph,
    "stopped": lambda line: f"stopped by {text_of(line.get('signal'))}",
    "end": lambda line: "finished",
}
