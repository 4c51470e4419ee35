"""How a benchmark of steps is told: a line for programs, or a row of a table below what all lines share.

Place in the flow: `benchmark.step` makes the lines as they are measured and hands them over one by one.
"""

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from everest_ds.config import Config
from everest_ds.distributed import World

if TYPE_CHECKING:
    import torch

STEP_HEAD = (
    f"{'micro':>6}{'clips/s':>10}{'tokens/s':>11}{'ms':>10}{'p90':>10}{'GiB':>8}{'reserved':>9}{'MB/clip':>9}"
    f"{'MFU':>7}{'sheet':>7}  attention linear other optimiser comm"
)
COMPARE_HEAD = f"{'micro':>6}  {'side':<9}{'clips/s':>10}{'ms':>11}{'p90':>11}{'GiB':>8}{'ours/theirs':>13}"


class Report:
    """Prints lines as they come, from rank zero.

    Args:
        world: This process's place.
        same: What all lines have in common, as `describe_run` returns it and more.
        head: Of the table.
        rows: Makes a line into rows of the table.
        as_json: One JSON object a line instead of the table.
    """

    def __init__(
        self,
        world: World,
        same: dict[str, Any],
        *,
        head: str,
        rows: Callable[[dict[str, Any]], Iterator[str]],
        as_json: bool,
    ) -> None:
        self.world, self.same, self.rows, self.as_json = world, same, rows, as_json
        if world.is_main and not as_json:
            print(f"{describe_measurement(same)}\n\n{head}", flush=True)

    def print(self, line: dict[str, Any], *, of_any_rank: bool = False) -> None:
        """Print a line, from rank zero unless said otherwise."""
        if not self.world.is_main and not of_any_rank:
            return
        print(json.dumps({**self.same, **line}) if self.as_json else "\n".join(self.rows(line)), flush=True)


def step_rows(line: dict[str, Any]) -> Iterator[str]:
    """Yield a measured micro-batch as its one row."""
    if line["out_of_memory"]:
        yield f"{line['micro_batch']:>6}  out of memory"
        return
    shares = line["shares"] or {}
    widths = (11, 7, 6, 10, 5)
    yield (
        f"{line['micro_batch']:>6}{line['clips_per_s']:>10.2f}{line['tokens_per_s']:>11.0f}"
        f"{line['step_ms_median']:>10.1f}{line['step_ms_p90']:>10.1f}{line['peak_allocated_gib']:>8.2f}"
        f"{_or_dash(line['peak_reserved_gib'], '9.2f')}{_or_dash(line['added_mb_per_clip'], '9.1f')}"
        f"{_or_dash(line['mfu'], '7.1%')}{_or_dash(line['mfu_data_sheet'], '7.1%')}"
        + "".join(f"{share:>{width}.1%}" for share, width in zip(shares.values(), widths, strict=False))
    )


def compare_rows(line: dict[str, Any]) -> Iterator[str]:
    """Yield a compared micro-batch, a row for each side."""
    for name, side in line.items():
        if name == "micro_batch":
            continue
        start = f"{line['micro_batch']:>6}  {name:<9}"
        if side["out_of_memory"]:
            yield f"{start}  out of memory"
            continue
        yield (
            f"{start}{side['clips_per_s']:>10.2f}{side['step_ms_median']:>11.1f}{side['step_ms_p90']:>11.1f}"
            f"{_or_dash(side['step_gib'], '8.2f')}{_or_dash(side.get('ours_to_theirs'), '13.3f')}"
        )


def growth_head(what: str) -> str:
    """Return the head of the table of a sweep over ratios or frames."""
    return (
        f"{what:>8}{'selected':>10}{'visible':>9}{'ms':>11}{'p90':>11}{'ms/1000':>9}{'line':>11}{'off':>9}"
        f"{'attention':>11}"
    )


def growth_rows(line: dict[str, Any]) -> Iterator[str]:
    """Yield a sweep as rows of a table, and what it comes to."""
    for row in line["points"]:
        on_line = ("-", "-")
        if row["line_ms"] is not None:
            on_line = (f"{row['line_ms']:.1f}", f"{row['off_line']:+.1%}")
        share = "-" if row["attention_share"] is None else f"{row['attention_share']:.1%}"
        yield (
            f"{row['value']:>8g}{row['tokens']:>10}{row['visible_tokens']:>9}{row['step_ms_median']:>11.1f}"
            f"{row['step_ms_p90']:>11.1f}{row['ms_per_1000_tokens']:>9.2f}{on_line[0]:>11}{on_line[1]:>9}{share:>11}"
            f"{'' if row['is_fitted'] else '  not in the line'}"
        )
    yield ""
    if line["fixed_ms"] is None:
        yield "no line: attention takes most of the step at too many points"
        return
    yield (
        f"line: {line['fixed_ms']:.1f} ms and {line['ms_per_1000_tokens']:.2f} ms for 1000 tokens; "
        f"linear within {line['worst_off_line']:.1%}"
    )


def _or_dash(value: float | None, form: str) -> str:
    width = form.split(".")[0]
    return f"{'-':>{width}}" if value is None else f"{value:>{form}}"


def describe_measurement(same: dict[str, Any]) -> str:
    """Return the recipe, the hardware, the versions and the commit of a benchmark, for people."""
    versions = ", ".join(
        f"{name} {same['environment']['versions'][name]}" for name in ("torch", "deepspeed", "timm")
    )
    known = (
        "gpus", "zero_stage", "precision", "attention", "activation_checkpointing", "recompute_attention",
        "compile_blocks", "includes", "time",
    )  # fmt: skip
    settings = ", ".join(f"{name} {same[name]}" for name in known if name in same)
    ceiling = same.get("ceiling_tflops")
    return (
        f"{same['recipe']}: ViT-{same['size']}, {same['tokens']}\n"
        f"{settings}; {same['steps']} steps after {same['warmup']}\n"
        f"{same['device']}{'' if ceiling is None else f', {ceiling:.0f} TFLOP/s in bf16 products'}; {versions}; "
        f"commit {same['environment']['commit']}"
    )


def describe_run(
    name: str, config: Config, device: "torch.device", *, steps: int, warmup: int, memory_gib: float | None
) -> dict[str, Any]:
    """Return what is measured and where, as fields of every line."""
    import torch

    from everest_ds.benchmark.machine import cpu_model
    from everest_ds.train.checkpoints.run_dir import describe_environment

    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else None
    return {
        "benchmark": name,
        "recipe": config.recipe,
        "size": config.model.size,
        "tokens": config.tokens,
        "steps": steps,
        "warmup": warmup,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {cpu_model()}",
        "device_memory_gib": None if memory is None else round(memory, 2),
        "memory_gib": memory_gib,
        "memory_is": "allocated" if on_gpu else "resident",
        "environment": describe_environment(),
    }
