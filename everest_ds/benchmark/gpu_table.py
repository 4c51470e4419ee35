"""`bash launch/measure_gpu.sh [MINUTES]`: measurements for docs/results.md in ten minutes on a GPU.

The most useful rows come first. Each runs in its own process with a time limit: the tests that need a GPU, then
steps of the present paths and of the earlier ones (DeepSpeed's own gradients, no CUDA graph, varlen attention).
After each row a JSON file and a Markdown table are replaced. The next call skips rows that were measured, and
repeats those that failed or ran out of time last. It needs no network and, besides the dependencies, no
installation: PYTHONPATH is enough.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.files import read_json_object, write_atomically, write_json

# A process needs about this long to import, build a model and report an error.
LEAST_S = 20.0
BEFORE = "--optim.gradients deepspeed --model.cuda-graph off --model.attention varlen"
EAGER = "--model.cuda-graph off"
SMALL = (
    "--model.size nano --data.image-size 64 --data.num-frames 4 --data.sampling-stride 1 --steps 2 --warmup 1 "
    "--model.no-activation-checkpointing"
)


@dataclass(frozen=True)
class TableRow:
    """A measurement in one process.

    Attributes:
        name: Key in the file, and label in the table.
        recipe: The recipe to measure; empty for the tests.
        words: Further arguments of `everest benchmark step`, or of pytest.
        limit_s: Time limit in seconds.
        sizes: Micro-batches, one line of the table each.
    """

    name: str
    recipe: str
    words: str
    limit_s: float
    sizes: tuple[int, ...] = ()


ROWS = (
    TableRow("gpu tests", "", "-m gpu", 150),
    TableRow("ViT-L now", "k400_vit_l", "", 90, (32, 64, 128, 256)),
    TableRow("ViT-L before", "k400_vit_l", BEFORE, 90, (32, 64, 128, 256)),
    TableRow("ViT-L flat, eager", "k400_vit_l", EAGER, 60, (32, 128)),
    TableRow("ViT-L compiled in the graph", "k400_vit_l", "--model.compile-blocks", 120, (32, 128)),
    TableRow("ViT-L varlen in the graph", "k400_vit_l", "--model.attention varlen", 60, (32, 128)),
    TableRow("ViT-L zero2.json", "k400_vit_l", "--ds-config ds_configs/zero2.json", 60, (32,)),
    TableRow("ViT-L zero1.json", "k400_vit_l", "--ds-config ds_configs/zero1.json", 60, (32,)),
    TableRow("ViT-B now", "k400_vit_b", "", 60, (32, 64, 512)),
    TableRow("ViT-B before", "k400_vit_b", BEFORE, 60, (512,)),
    TableRow("ViT-H now", "k400_vit_h", "--model.no-activation-checkpointing", 90, (32, 64, 128, 256)),
    TableRow("ViT-H before", "k400_vit_h", f"--model.no-activation-checkpointing {BEFORE}", 90, (128,)),
    TableRow("ViT-L both paths of gradients", "k400_vit_l", "--compare-gradients zero0 zero1 zero2", 120, (32,)),
    TableRow("ViT-B against official code", "k400_vit_b", "--compare everest videomae", 120, (64, 256)),
    TableRow("ViT-L against official code", "k400_vit_l", "--compare everest videomae", 120, (32, 128)),
)  # fmt: skip
HEAD = (
    "| what | micro-batch | clips/s | step, ms (median) | MFU | peak allocated GiB | aten calls | launches |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main(words: Sequence[str] | None = None) -> int:
    """Measure the remaining rows within the time, and return 0; 1 if a row failed."""
    parser = argparse.ArgumentParser(
        prog="measure_gpu.sh", description="Measure the rows of docs/results.md on a GPU."
    )
    parser.add_argument("minutes", nargs="?", type=float, default=10.0, help="stop after this many minutes")
    parser.add_argument("--out", type=Path, default=Path("gpu_table.json"), help="file of the measurements")
    parser.add_argument("--small", action="store_true", help="use a tiny model, also on a CPU, to try the rows out")
    parser.add_argument("--only", nargs="*", default=[], help="measure only these rows, by name")
    given = parser.parse_args(words)
    done: dict[str, Any] = read_json_object(given.out) if given.out.is_file() else {}
    until = time.monotonic() + 60 * given.minutes
    rows = [row for row in ROWS if not given.only or row.name in given.only]
    for row in rows:  # a record of another command, or of the tiny model, does not count as measured
        if row.name in done and done[row.name]["command"] != shown(command_of(row, small=given.small)):
            del done[row.name]
    for row in (*(r for r in rows if r.name not in done), *(r for r in rows if failed(done.get(r.name)))):
        left_s = until - time.monotonic()
        if left_s < min(LEAST_S, row.limit_s):
            print(f"time is up before {row.name!r}; the same command continues there", flush=True)
            break
        print(f"{row.name} ...", flush=True)
        done[row.name] = measure(row, min(row.limit_s, left_s), small=given.small)
        write_json(given.out, done)
        write_atomically(given.out.with_suffix(".md"), "\n".join([HEAD, *table(done)]) + "\n")
        print(f"  {done[row.name]['says']}", flush=True)
    print(f"measurements: {given.out}; rows for docs/results.md: {given.out.with_suffix('.md')}", flush=True)
    return 1 if any(failed(done.get(row.name)) for row in rows) else 0


def shown(command: Sequence[str]) -> str:
    """Return a command as it is recorded, without the interpreter."""
    return " ".join(command[1:])


def failed(record: dict[str, Any] | None) -> bool:
    """Return whether a row was tried and failed or ran out of time."""
    return record is not None and record["returncode"] != 0


def measure(row: TableRow, limit_s: float, *, small: bool) -> dict[str, Any]:
    """Run a row and return its record: command, exit code (None: out of time), seconds, JSON lines, last output."""
    command = command_of(row, small=small)
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
        returncode: int | None = process.returncode
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        returncode = None
    lines = list(lines_of(stdout))
    last = [line.strip() for line in (*stderr.splitlines(), *stdout.splitlines()) if line.strip()][-1:]
    plain = [line.strip() for line in stdout.splitlines() if line.strip() and not line.startswith("{")]
    says = f"stopped after {limit_s:.0f} s" if returncode is None else " ".join((plain or last)[-1:])
    if returncode == 0 and lines:
        says = f"{len(lines)} lines"
    elif returncode:
        says = "; ".join(stderr.strip().splitlines()[-1:]) or says
    return {
        "command": shown(command),
        "returncode": returncode,
        "wall_s": round(time.monotonic() - began, 1),
        "lines": lines,
        "says": says,
    }


def lines_of(stdout: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines of a benchmark; other output, and a line that was cut off, is skipped."""
    for text in stdout.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text) if text.startswith("{") else None
            if isinstance(line, dict):
                yield line


def command_of(row: TableRow, *, small: bool) -> list[str]:
    """Return the command of a row."""
    if not row.recipe:
        chosen = "tests/unit/train/step/test_device_feed.py" if small else "tests"
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", chosen, *row.words.split()]
    sizes = [str(size) for size in ((1, 2) if small else row.sizes)[: 1 if "--compare-" in row.words else None]]
    words = ["benchmark", "step", row.recipe, "--micro-batch", *sizes, *row.words.split(), "--json"]
    return [sys.executable, "-m", "everest_ds", *words, *(SMALL.split() if small else ())]


def table(done: dict[str, Any]) -> Iterator[str]:
    """Yield the Markdown rows of all measured lines."""
    for name, record in done.items():
        for line in record["lines"]:
            for path, figures in sides(line):
                shown = f"{name}{f', {path}' if path else ''}"
                mfu = figures.get("mfu")
                cells = (
                    line.get("micro_batch"), figures.get("clips_per_s"), figures.get("step_ms_median"),
                    None if mfu is None else f"{mfu:.1%}", figures.get("peak_allocated_gib"),
                    figures.get("aten_calls"), figures.get("kernel_launches"),
                )  # fmt: skip
                yield f"| {shown} | " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |"


def sides(line: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the compared measurements of a line by name; for a line without a comparison, the line itself."""
    compared = line.get("paths") or line.get("sides")
    if isinstance(compared, dict):
        return [(f"{line.get('ds_config', '')} {name}".strip(), figures) for name, figures in compared.items()]
    return [("", line)]


if __name__ == "__main__":
    sys.exit(main())
