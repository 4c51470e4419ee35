"""The work of `everest plan`: prints the settings that fit as a table or JSON, and the command for the best one."""

import dataclasses
import json
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everest_ds.config import Config, FinetuneConfig
from everest_ds.distributed import World
from everest_ds.planning.job import PlanJob, PlanOptions
from everest_ds.planning.memory import ASSUMED_CONTEXT_BYTES, ASSUMED_FRAGMENTATION
from everest_ds.planning.planner import Setting, SmallestChange, in_gib, plan_settings, recommend, smallest_change
from everest_ds.planning.sharding import ASSUMED_CLASSES, count_parameters
from everest_ds.train.engine import check_sections, load_systems, shipped_files, shipped_systems

# On one node; more GPUs need a host file.
MAX_GPUS_OF_A_NODE = 8
PARTS = (
    "parameters", "gradients", "optimizer", "average", "gathered", "activations", "attention", "ranking",
    "collected", "pool", "step", "input", "communication", "transient", "overhead", "allocated", "total", "host",
    "copies", "host_memory", "sent",
)  # fmt: skip
# Column heads of the table, and the part that each shows.
COLUMNS = {
    "params": "parameters", "grads": "gradients", "optim": "optimizer", "ema": "average", "input": "input",
    "comm": "communication", "work": "transient", "over": "overhead", "total": "total", "activ": "activations",
    "attn": "attention", "sent": "sent", "host": "host_memory",
}  # fmt: skip

SETTING_COLUMNS = ("total", "host", "sent")
SUMMANDS = ("params", "grads", "optim", "ema", "input", "comm", "work", "over")
_WIDTH = 80
_LEGEND = """ckpt: blocks are recomputed in backward; part: all but attention, whose output
is kept. host: host memory for offload and for copies of checkpoints.
sent: data that a GPU sends in a step.
work: the largest of activations (activ, attn of them for attention), ranking,
gradients and step, and gathered parameters; with a CUDA graph the step is added
to the others.
Assumed, not yet measured: `over`, 1.5 GiB for CUDA and NCCL and 5 % for
fragmentation."""


def run(job: PlanJob, world: World) -> int:
    """Print the settings that fit and return 0; if none fits, print the smallest change that would and return 1.

    Raises:
        UserError: A DeepSpeed file is refused.
    """
    config, options = job.config, job.options
    systems, paths = _systems(options.ds_config)
    memory_bytes, gpus = int(options.gpu_memory_gib * 2**30), options.gpus
    settings = plan_settings(config, systems, num_gpus=gpus, memory_bytes=memory_bytes, precision=options.precision)
    rows = [_row(setting, memory_bytes, paths) for setting in settings]
    chosen = recommend(settings, memory_bytes)
    command = recommended = smallest = None
    if chosen is not None:
        command = _command(chosen, job.recipe, job.base, paths[chosen.name])
        recommended = _row(chosen, memory_bytes, paths)
        advice = f"{_wrapped(_describe_choice(chosen, options))}\n{command}"
    else:
        change = smallest_change(
            config, systems, num_gpus=gpus, memory_bytes=memory_bytes, precision=options.precision
        )
        smallest = {
            "gpu_memory_bytes": change.leanest.estimate.total,
            "ds_config": change.leanest.name,
            "gpus": change.more_gpus.sharding.world_size if change.more_gpus else None,
        }
        advice = _wrapped(_describe_change(change, options))
    if options.json:
        document = {
            "recipe": config.recipe,
            "gpus": gpus,
            "gpu_memory_gib": options.gpu_memory_gib,
            "global_size": config.batch.global_size,
            "precision": options.precision,
            "settings": rows,
            "command": command,
            "smallest_change": smallest,
            "assumed": {"context_bytes": ASSUMED_CONTEXT_BYTES, "fragmentation": ASSUMED_FRAGMENTATION},
            "recommended": recommended,
        }
        print(json.dumps(document))
    else:
        print(advice)
        _print_tables(config, options, rows)
    return 0 if chosen else 1


def _systems(path: Path | None) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the DeepSpeed configurations to plan with and their files."""
    if path is None:
        return shipped_systems(), {name: str(path) for name, path in shipped_files().items()}
    systems = load_systems(path)
    check_sections(systems, str(path))
    return {path.stem: systems}, {path.stem: str(path)}


def _row(setting: Setting, memory_bytes: int, paths: dict[str, str]) -> dict[str, Any]:
    """Return a setting as plain values, sizes in bytes."""
    estimate = setting.estimate
    return {
        "ds_config": paths[setting.name],
        "activation_checkpointing": setting.checkpointing,
        "recompute_attention": setting.config.model.recompute_attention,
        "fits": estimate.total <= memory_bytes,
        "micro_size": setting.micro_size,
        "accumulation_steps": setting.sharding.accumulation_steps,
        "bytes": {part: getattr(estimate, part) for part in PARTS},
        "not_modelled": list(estimate.not_modelled),
    }


def _print_tables(config: Config, options: PlanOptions, rows: list[dict[str, Any]]) -> None:
    """Print how each setting runs and its total memory, then the parts of that; 80 columns."""
    parts = {head: part for head, part in COLUMNS.items() if head not in SETTING_COLUMNS}
    if not any(row["bytes"]["average"] for row in rows):
        del parts["ema"]
    summands = " + ".join(head for head in parts if head in SUMMANDS)
    print(
        f"\n{config.recipe}: ViT-{config.model.size}\n{_describe_parameters(config)}; {config.tokens}\n"
        f"batch {config.batch.global_size} on {options.gpus} GPUs of {options.gpu_memory_gib:g} GiB"
        f"{'' if options.precision == 'auto' else f', {options.precision}'}\n\n"
        "Estimated peak of one GPU in GiB, at the largest micro-batch that fits\n(* not even one clip does).\n"
    )
    heads = "".join(f"{head:>8}" for head in SETTING_COLUMNS)
    print(f"{'ds_config':<14}{'ckpt':>5}{'micro':>6}{'accum':>6}{heads}")
    for row in rows:
        micro = f"{row['micro_size']}{'' if row['fits'] else '*'}"
        print(f"{_name(row)}{micro:>6}{row['accumulation_steps']:>6}" + _sizes(row, SETTING_COLUMNS, 8))
    print(f"\n{'of the total':<14}{'ckpt':>5} " + "".join(f"{head:>6}" for head in parts))
    for row in rows:
        print(f"{_name(row)} {_sizes(row, list(parts), 6)}")
    unknown = {name for row in rows for name in row["not_modelled"]}
    if unknown:
        print(_wrapped(f"\nwarning: not counted: {', '.join(sorted(unknown))}"))
    print(f"\ntotal = {summands}.\n{_LEGEND}")


def _name(row: dict[str, Any]) -> str:
    recomputes = "no"
    if row["activation_checkpointing"]:
        recomputes = "yes" if row["recompute_attention"] else "part"
    stem = Path(row["ds_config"]).stem
    return f"{stem if len(stem) <= 14 else f'{stem[:13]}…':<14}{recomputes:>5}"


def _sizes(row: dict[str, Any], heads: Sequence[str], width: int) -> str:
    sizes = [row["bytes"][COLUMNS[head]] / 2**30 for head in heads]
    return "".join(f"{size:>{width}.{2 if size < 99.995 else 1}f}" for size in sizes)


def _wrapped(text: str) -> str:
    """Return a text wrapped to 80 columns; words are not broken."""
    lines = text.split("\n")
    return "\n".join(textwrap.fill(line, _WIDTH, break_long_words=False, break_on_hyphens=False) for line in lines)


def _describe_parameters(config: Config) -> str:
    counts = count_parameters(config)
    said = f"{counts.total / 1e6:.1f} M parameters"
    if counts.frozen:
        said += f" ({sum(counts.trained) / 1e6:.2g} M trained)"
    if isinstance(config, FinetuneConfig) and config.data.num_classes is None:
        said += f", {ASSUMED_CLASSES} classes assumed"
    return said


def _describe_choice(chosen: Setting, options: PlanOptions) -> str:
    steps = chosen.sharding.accumulation_steps
    return (
        f"recommended: {chosen.name} {_recomputation_words(chosen)}, {chosen.config.batch.global_size} = "
        f"{chosen.micro_size} a GPU x {options.gpus} GPUs x {steps} accumulation steps, "
        f"{in_gib(chosen.estimate.total):.2f} GiB of {options.gpu_memory_gib:g}"
    )


def _describe_change(change: SmallestChange, options: PlanOptions) -> str:
    lean, more = change.leanest, change.more_gpus
    how = _recomputation_words(lean)
    wishes = [f"GPUs of {in_gib(lean.estimate.total):.2f} GiB ({lean.name} {how}, micro-batch 1)"]
    if more is not None:
        gpus = more.sharding.world_size
        wishes.append(f"{gpus} GPUs of {options.gpu_memory_gib:g} GiB ({more.name}, micro-batch 1)")
    return f"nothing fits. The smallest change that would: {', or '.join(wishes)}"


def _recomputation_words(setting: Setting) -> str:
    if setting.checkpointing and not setting.recomputes_attention:
        return "with recomputation of all but attention"
    return f"{'with' if setting.checkpointing else 'without'} recomputation"


def _command(setting: Setting, recipe: str, base: Config, ds_config: str) -> str:
    """Return the command that runs a setting: the recipe, and a flag for every field that differs from it."""
    gpus = setting.sharding.world_size
    where = ["--num_gpus", str(gpus)] if gpus <= MAX_GPUS_OF_A_NODE else ["--hostfile", "HOSTFILE"]
    words = ["deepspeed", "--no_local_rank", *where, "--module", "everest_ds", setting.config.task, recipe]
    words += config_flags(setting.config, base)
    if setting.config.data.train_list is None:
        words += ["--data.train-list", "LIST"]
    if setting.config.task == "finetune":
        words += ["--init-from", "WEIGHTS"]
    words += ["--ds-config", ds_config]
    if setting.precision is not None:
        words += ["--precision", setting.precision]
    return shlex.join([*words, "--out", f"runs/{setting.config.recipe}"])


def config_flags(config: Config, base: Config) -> list[str]:
    """Return the flags that turn one configuration into another."""
    flags = []
    for section in dataclasses.fields(config):
        if section.name in ("recipe", "task"):
            continue
        ours, theirs = getattr(config, section.name), getattr(base, section.name)
        for field in dataclasses.fields(ours):
            value = getattr(ours, field.name)
            if value == getattr(theirs, field.name):
                continue
            name = field.name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{section.name}.{'' if value else 'no-'}{name}")
            else:
                values = value if isinstance(value, tuple) else (value,)
                flags += [f"--{section.name}.{name}", *(str(item) for item in values)]
    return flags
