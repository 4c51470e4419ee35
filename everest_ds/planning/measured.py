"""What `everest benchmark step --sweep-stages` has measured: one file, written there and read by `everest plan`.

format       of this file
config       the recipe with its flags, as RUN/config.json has it
gpus         processes, one a GPU
device       its name, device_memory_gib its memory (null on a CPU), environment the versions and the commit
rows         the lines of `everest benchmark step`, their ds_config by name
faults       why stages could not be measured, by name
recommended  the fastest row that makes up the recipe's global batch, or null
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from everest_ds.config import BatchConfig, Config
from everest_ds.config.file import config_from_dict, read_json_object
from everest_ds.errors import UserError
from everest_ds.files import write_json

FORMAT = "everest-stages-2"
KEYS = (
    "format", "config", "gpus", "device", "device_memory_gib", "environment", "rows", "faults", "recommended",
)  # fmt: skip
# What a step costs depends on these; seeds, learning rates and lists do not matter.
FIELDS_OF_STEP = {
    "data": ("num_frames", "image_size"),
    "model": (
        "size", "patch_size", "tubelet_size", "embedding_layers", "decoder_depth", "drop_path", "freeze_encoder",
        "compile_blocks",
    ),
    "selection": (
        "strategy", "selected_ratio", "visible_ratio", "targets", "budget", "floor", "ceiling", "alpha",
        "keep_ratio",
    ),
}  # fmt: skip
# A GPU's whole memory is not its name's: of 80 GB, 79.1 GiB can be had.
MEMORY_RTOL = 0.1


def fastest(rows: Sequence[dict[str, Any]], global_size: int) -> dict[str, Any] | None:
    """Return the row of the most clips a second whose micro-batches make up a global batch, or None."""
    usable = [
        row for row in rows if not row["out_of_memory"] and global_size % (row["micro_batch"] * row["gpus"]) == 0
    ]
    return max(usable, key=lambda row: float(row["clips_per_s"]), default=None)


def write_measured(
    path: Path, config: Config, rows: Sequence[dict[str, Any]], faults: dict[str, str], *, gpus: int
) -> dict[str, Any]:
    """Write what was measured of a run, and return it.

    Args:
        path: Where; folders are made.
        config: The run.
        rows: Its lines, at least one.
        faults: Why stages could not be measured, by name.
        gpus: Processes.
    """
    document = {
        "format": FORMAT,
        "config": asdict(config),
        "gpus": gpus,
        "device": rows[0]["device"],
        "device_memory_gib": rows[0]["memory_gib"] or rows[0]["device_memory_gib"],
        "environment": rows[0]["environment"],
        "rows": list(rows),
        "faults": faults,
        "recommended": fastest(rows, config.batch.global_size),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    return document


def read_measured(path: Path, config: Config, *, gpus: int, gpu_memory_gib: float) -> dict[str, Any]:
    """Read what was measured, for a plan.

    Raises:
        UserError: The file is none of ours, or is of another recipe, of other settings that cost time or memory, of
            another number of GPUs or of GPUs of another size; the message says which.
    """
    document = read_json_object(path)
    if document.get("format") != FORMAT or set(document) != set(KEYS):
        raise UserError(f"{path} is not what `everest benchmark step --sweep-stages` of this version writes")
    measured = config_from_dict(document["config"], source=f"{path}, config")
    again = f"measure again with `everest benchmark step {config.recipe} --sweep-stages --gpus {gpus}`"
    if measured.recipe != config.recipe:
        raise UserError(f"{path} is of recipe {measured.recipe}, this plan of {config.recipe}; {again}")
    theirs, ours = asdict(measured), asdict(config)
    for section, names in FIELDS_OF_STEP.items():
        for name in names:
            if theirs[section].get(name) != ours[section].get(name):
                raise UserError(
                    f"{path} is of {section}.{name}={theirs[section][name]}, this plan of "
                    f"{ours[section][name]}; {again}"
                )
    if document["gpus"] != gpus:
        raise UserError(f"{path} is of {document['gpus']} GPUs, this plan of --gpus {gpus}; {again}")
    memory = document["device_memory_gib"]
    if memory is not None and abs(memory - gpu_memory_gib) > MEMORY_RTOL * gpu_memory_gib:
        raise UserError(
            f"{path} is of GPUs of {memory:g} GiB ({document['device']}), this plan of --gpu-memory-gib "
            f"{gpu_memory_gib:g}; plan for those, or {again}"
        )
    return document


def beside_estimates(document: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    """Return each measured row with the bytes that the plan estimates for the same setting.

    Args:
        document: As `read_measured` returns it.
        config: The run that is planned.
    """
    from everest_ds.planning.memory import estimate_memory
    from everest_ds.train.engine import resolve_ds_config, shipped_systems

    systems, gpus = shipped_systems(), document["gpus"]
    rows = []
    for row in document["rows"]:
        if row["ds_config"] not in systems:
            raise UserError(f"measured ds_config {row['ds_config']} is not in ds_configs any more; measure again")
        micro_size = row["micro_batch"]
        same = replace(
            config,
            batch=BatchConfig(global_size=micro_size * gpus, micro_size=micro_size),
            model=replace(
                config.model,
                activation_checkpointing=row["activation_checkpointing"],
                recompute_attention=row["recompute_attention"],
            ),
        )
        ds_config = resolve_ds_config(
            systems[row["ds_config"]], same, world_size=gpus, precision=row["precision"], device_type="cuda"
        )
        estimate = estimate_memory(same, ds_config, world_size=gpus)
        rows.append({**row, "estimated_allocated_gib": round(estimate.allocated / 2**30, 4)})
    return rows


def recomputation_of(row: dict[str, Any]) -> str:
    """Return what of each block a row computes again, for a table: no, part (all but attention) or yes."""
    if not row["activation_checkpointing"]:
        return "no"
    return "yes" if row["recompute_attention"] else "part"


def describe_measured(document: dict[str, Any], rows: Sequence[dict[str, Any]], command: str | None) -> str:
    """Return a table of what was measured beside what is estimated, and what to run."""
    lines = [
        f"\nMeasured on {document['gpus']} x {document['device']}, torch "
        f"{document['environment']['versions']['torch']}, commit {document['environment']['commit']}.",
        f"{'ds_config':<14}{'ckpt':>5}{'micro':>6}{'clips/s':>10}{'ms':>10}{'GiB':>8}{'estimated':>11}",
    ]
    for row in rows:
        recomputes = recomputation_of(row)
        start = f"{row['ds_config']:<14}{recomputes:>5}{row['micro_batch']:>6}"
        if row["out_of_memory"]:
            lines.append(f"{start}  out of memory{row['estimated_allocated_gib']:>25.2f}")
            continue
        lines.append(
            f"{start}{row['clips_per_s']:>10.2f}{row['step_ms_median']:>10.1f}{row['peak_allocated_gib']:>8.2f}"
            f"{row['estimated_allocated_gib']:>11.2f}"
        )
    lines += [f"{name:<14} not measured: {fault}" for name, fault in document["faults"].items()]
    if document["device_memory_gib"] is None:
        lines.append("warning: measured on a CPU, where GiB are those of the whole process; GPUs differ in speed")
    lines.append(
        "none of these makes up the global batch" if command is None else f"\nfastest as measured:\n{command}"
    )
    return "\n".join(lines)
