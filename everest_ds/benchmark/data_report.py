"""Results of `everest benchmark data`: records for programs, and a table for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from everest_ds.benchmark.machine import num_cores
from everest_ds.benchmark.stages import STAGES, Costs

if TYPE_CHECKING:
    from everest_ds.benchmark.data import Measured


def describe(
    one: "Measured",
    rates: Sequence[Mapping[int, float]],
    *,
    gpu_clips_per_s: float | None,
    machine: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yield a record for each way that a list was read.

    Args:
        one: The list.
        rates: Clips a second of the loader by its number of processes, for each way.
        gpu_clips_per_s: Clips a second that one GPU trains, where it is known.
        machine: Where this ran.
    """
    official = next((costs for way, costs in zip(one.ways, one.costs, strict=True) if way.name == "official"), None)
    data = one.config.data
    for way, costs, loader in zip(one.ways, one.costs, rates, strict=True):
        yield {
            "benchmark": "data",
            "recipe": one.config.recipe,
            "list": str(one.path),
            "way": way.name,
            "repeats": way.repeats,
            "videos": len(one.readable),
            "left_out": [{"path": str(bad.path), "way": bad.way, "reason": bad.reason} for bad in one.left_out],
            "frames": list(one.frames),
            "sizes": one.sizes,
            "clip": f"{data.num_frames}x{data.image_size}x{data.image_size}",
            "sampling_stride": data.sampling_stride if data.sampling_seconds is None else None,
            "sampling_seconds": data.sampling_seconds,
            "rounds": len(costs.rounds),
            "ms": {stage: _rounded(costs.stage_ms(stage)) for stage in STAGES},
            "clip_ms": _rounded(costs.clip_ms),
            "clip_p90_ms": _rounded(costs.clip_p90_ms),
            "ratio_to_official": None if official is None else _rounded(costs.ratio_to(official)),
            "clips_per_s_core": _rounded(costs.clips_per_s_core),
            "loader_clips_per_s": {str(workers): _rounded(rate) for workers, rate in loader.items()},
            "gpu_clips_per_s": gpu_clips_per_s,
            **_fed(costs, loader, gpu_clips_per_s),
            "environment": dict(machine),
        }


def _say_sampling(record: Mapping[str, Any]) -> str:
    if record["sampling_seconds"] is not None:
        return f"with a frame every {record['sampling_seconds']:g} s"
    return f"at stride {record['sampling_stride']}"


def _fed(costs: Costs, loader: Mapping[int, float], gpu_clips_per_s: float | None) -> dict[str, Any]:
    """Return how many GPUs are fed by loader processes and by all cores, and the cores that one GPU needs."""
    if gpu_clips_per_s is None:
        return {"gpus_fed": None, "cores_per_gpu": None}
    fed = {str(workers): _rounded(rate / gpu_clips_per_s) for workers, rate in loader.items()}
    fed["all_cores"] = _rounded(num_cores() * costs.clips_per_s_core / gpu_clips_per_s)
    return {"gpus_fed": fed, "cores_per_gpu": _rounded(gpu_clips_per_s / costs.clips_per_s_core)}


def format_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the records as a table, and in words how many GPUs are fed where that was asked."""
    first = records[0]
    machine, versions = first["environment"], first["environment"]["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "decord", "av", "pillow"))
    workers = list(dict.fromkeys(count for record in records for count in record["loader_clips_per_s"]))
    lines = [
        f"{first['recipe']}: clips of {first['clip']} {_say_sampling(first)}; "
        f"{first['rounds']} rounds after one of warm-up, medians",
        f"{machine['cpu']}, {machine['cores']} cores; {known}; commit {machine['commit'] or 'unknown'}",
        "CPU ms a clip of all threads; `clip` is open + decode + augment, `ratio` that over the official way's;",
        "clips/s of one core (collating too), and of the loader with so many processes by the clock on the wall",
        "",
    ]
    lines += [f"{record['list']}: {_say_videos(record)}" for record in _one_a_list(records)]
    width = max(4, *(len(record["list"]) for record in records)) + 2
    head = "".join(f"{stage:>9}" for stage in (*STAGES, "clip", "p90", "ratio", "1 core"))
    head += "".join(f"{f'{count} proc.':>9}" for count in workers)
    lines += ["", f"{'list':<{width}}{'way':<11}{'repeats':>7}{head}"]
    for record in records:
        costs = [*(record["ms"][stage] for stage in STAGES), record["clip_ms"], record["clip_p90_ms"]]
        rates = [record["clips_per_s_core"], *(record["loader_clips_per_s"].get(count) for count in workers)]
        cells = "".join(_cell(cost, 2) for cost in costs) + _cell(record["ratio_to_official"], 3)
        cells += "".join(_cell(rate, 1) for rate in rates)
        lines.append(f"{record['list']:<{width}}{record['way']:<11}{record['repeats']:>7}{cells}")
    if first["gpu_clips_per_s"] is not None:
        lines += ["", f"GPUs that train {first['gpu_clips_per_s']:g} clips/s:"]
        lines += [_say_fed(record) for record in records]
    return "\n".join(lines)


def _one_a_list(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list({record["list"]: record for record in records}.values())


def _say_videos(record: Mapping[str, Any]) -> str:
    least, most = record["frames"]
    frames = str(least) if least == most else f"{least} to {most}"
    left_out = f", {len(record['left_out'])} left out" if record["left_out"] else ""
    return f"{record['videos']} videos{left_out}, {frames} frames, {', '.join(record['sizes'])}"


def _say_fed(record: Mapping[str, Any]) -> str:
    fed = dict(record["gpus_fed"])
    cores = fed.pop("all_cores")
    loader = "".join(f"{count} processes feed {number:.2f}, " for count, number in fed.items())
    name = f"{record['list']}, {record['way']}, repeats {record['repeats']}"
    return f"  {name}: {loader}all cores {cores:.2f}; one needs {record['cores_per_gpu']:.1f} cores"


def _cell(value: float | None, digits: int) -> str:
    return f"{'-' if value is None else f'{value:.{digits}f}':>9}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
