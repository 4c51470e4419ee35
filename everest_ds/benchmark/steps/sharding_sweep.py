"""`everest benchmark step RECIPE --sweep-stages`: measures several ZeRO stages and writes the fastest to a file.

Each stage is measured by the same command in processes of its own, so that measurements and failures do not affect
each other. On several GPUs, processes are started by `torch.distributed.run --standalone`, which finds a free port
and ends all processes if one fails.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from everest_ds.benchmark.options import StepOptions
from everest_ds.config import Config
from everest_ds.config.file import dump_config
from everest_ds.errors import UserError, nearest_hint
from everest_ds.files import write_json
from everest_ds.interrupts import ending_with_us
from everest_ds.train.engine import shipped_files

FORMAT = "everest-stages-2"


def sweep_stages(config: Config, options: StepOptions) -> int:
    """Measure every stage, print and write the results and a recommendation, and return 0; 1 if a stage failed."""
    files = named_files("--stages", options.stages)
    gpus = options.gpus or max(torch.cuda.device_count(), 1)
    out = options.out or Path("runs") / f"{config.recipe}-stages.json"
    rows: list[dict[str, Any]] = []
    faults: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "config.json"
        recipe.write_text(dump_config(config), encoding="utf-8")
        for name in options.stages:
            done = _run(_command(recipe, files[name], gpus, options), gpus)
            printed = [line for line in done.stdout.splitlines() if line.startswith('{"benchmark": "step"')]
            found = [{**json.loads(line), "ds_config": name} for line in printed]
            rows += found
            if done.returncode and not any(row["out_of_memory"] for row in found):
                faults[name] = _last_line(done.stderr)
            if not options.json:
                _print_stage(name, found, faults.get(name))
    if not rows:
        raise UserError(f"no stage could be measured: {'; '.join(f'{n}: {text}' for n, text in faults.items())}")
    best = fastest(rows, config.batch.global_size)
    document = {
        "format": FORMAT,
        "config": asdict(config),  # as in RUN/config.json
        "gpus": gpus,
        "device": rows[0]["device"],
        "device_memory_gib": rows[0]["memory_gib"] or rows[0]["device_memory_gib"],  # null on a CPU
        "environment": rows[0]["environment"],
        "rows": rows,  # the lines of `everest benchmark step`, with the name of the file as ds_config
        "faults": faults,  # why stages could not be measured, by name
        "recommended": best,  # the fastest row whose micro-batches divide the recipe's global batch, or null
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, document)
    if options.json:
        print(json.dumps(document))
    else:
        result = "none fits" if best is None else f"fastest: {best['ds_config']}, micro-batch {best['micro_batch']}"
        print(f"{result}; written to {out}")
    return 1 if faults else 0


def named_files(option: str, names: Sequence[str]) -> dict[str, Path]:
    """Return the paths of files of ds_configs/ by name.

    Raises:
        UserError: There is no file of this name.
    """
    files = shipped_files()
    for name in names:
        if name not in files:
            raise UserError(f"{option} {name}: ds_configs has no such file{nearest_hint(name, files)}")
    return {name: files[name] for name in names}


def fastest(rows: Sequence[dict[str, Any]], global_size: int) -> dict[str, Any] | None:
    """Return the fastest row whose micro-batches divide the global batch; None if there is no such row."""
    fitting = [row for row in rows if not row["out_of_memory"]]
    usable = [row for row in fitting if global_size % (row["micro_batch"] * row["gpus"]) == 0]
    return max(usable, key=lambda row: float(row["clips_per_s"]), default=None)


def _command(recipe: Path, ds_config: Path, gpus: int, options: StepOptions) -> list[str]:
    start = [sys.executable, "-m"]
    if gpus > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m"]
    words = ["benchmark", "step", str(recipe), "--ds-config", str(ds_config), "--json"]
    words += ["--steps", str(options.steps), "--warmup", str(options.warmup), "--precision", options.precision]
    if options.micro_batch:
        words += ["--micro-batch", *options.micro_batch]
    if options.memory_gib is not None:
        words += ["--memory-gib", str(options.memory_gib)]
    return [*start, "everest_ds", *words]


def _run(command: Sequence[str], gpus: int) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; on a CPU its processes share the cores."""
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // gpus)), **os.environ}
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process,
        ending_with_us(process),
    ):
        stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _last_line(stderr: str) -> str:
    """Return the message of a failed process: our error line, else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("everest: error: ")]
    return (own or lines or ["it printed nothing"])[-1].removeprefix("everest: error: ")


def _print_stage(name: str, rows: Sequence[dict[str, Any]], fault: str | None) -> None:
    form = "{clips_per_s:.2f} clips/s, step {step_ms_median:.1f} ms, {peak_allocated_gib:.2f} GiB"
    for row in rows:
        text = "out of memory" if row["out_of_memory"] else form.format_map(row)
        print(f"{name:<14} micro-batch {row['micro_batch']:>5}: {text}", flush=True)
    if fault:
        print(f"{name:<14} failed: {fault}", flush=True)
