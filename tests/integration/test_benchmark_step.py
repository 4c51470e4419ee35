"""`everest benchmark step` as users start it: real steps on one and two processes, and all stages."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.config import Config
from everest_ds.recipes import find_config
from everest_ds.train.tasks import make_task
from tests.conftest import REPOSITORY
from tests.integration.launch import compute, cpu_environment, ds_config
from tests.integration.scanning import run_in_turn

SMALL = "--model.size nano --data.num-frames 4 --data.image-size 32"
FEW = "--steps 3 --warmup 1"


def lines_of(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines() if line.startswith('{"benchmark"')]


def small(recipe: str) -> Config:
    config = find_config(recipe)
    return replace(
        config,
        model=replace(config.model, size="nano"),
        data=replace(config.data, num_frames=4, image_size=32),
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_line_of_real_steps_is_whole_and_consistent(processes: int) -> None:
    words = f"benchmark step demo {SMALL} {FEW} --micro-batch 2 3 --json --precision fp32"
    done = compute([*shlex.split(words), "--ds-config", ds_config("zero1")], processes=processes)
    assert done.returncode == 0, done.stderr
    lines = lines_of(done.stdout)
    assert [line["micro_batch"] for line in lines] == [2, 3]
    config = small("demo")
    flops = make_task(config).clip_flops()
    for line in lines:
        assert (line["gpus"], line["zero_stage"], line["precision"], line["attention"]) == (
            processes, 1, "fp32", "sdpa",
        )  # fmt: skip
        assert line["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
        assert line["tokens_per_s"] / line["clips_per_s"] == pytest.approx(config.num_visible, rel=1e-2)
        assert 0 < line["step_ms_median"] <= line["step_ms_p90"]
        assert line["tflops"] == pytest.approx(line["clips_per_s"] / processes * flops / 1e12, abs=1e-4)
        assert sum(line["shares"].values()) == pytest.approx(1, abs=5e-4)
        assert line["shares"]["optimiser"] > 0
        assert line["peak_allocated_gib"] > 0
        assert line["aten_calls"] == sum(line["aten_calls_by_phase"].values()) > 500
        for name in (
            "peak_reserved_gib",
            "mfu",
            "mfu_data_sheet",
            "ceiling_tflops",
            "added_mb_per_clip",
            "kernel_launches",
        ):
            assert line[name] is None


# Limits of the aten calls a step of ViT-L (24 and 4 blocks) in bf16 on one process: the number measured with torch
# 2.14 plus 3 %; at ZeRO-1 and 2 the goal (measured 8,937).
# DeepSpeed's own path makes 35,394, 13,765 and 27,205 calls at ZeRO-0, 1 and 2.
CALLS = {"zero0": 12_640, "zero1": 9_000, "zero2": 9_000, "zero3": 26_070}


def test_calls_of_a_step_stay_within_bounds_at_every_stage(tmp_path: Path) -> None:
    shape = "--model.size thin --data.image-size 64 --data.num-frames 4 --micro-batch 1"
    words = f"benchmark step k400_vit_l {shape} --steps 1 --warmup 1 --json".split()
    for done, (name, bound) in zip(
        run_in_turn([[*words, "--ds-config", ds_config(name)] for name in CALLS], tmp_path),
        CALLS.items(),
        strict=True,
    ):
        assert done.returncode == 0, done.stderr
        (line,) = lines_of(done.stdout)
        assert 7_000 < line["aten_calls"] <= bound, name


def test_both_paths_of_the_gradients_take_the_same_steps() -> None:
    words = f"benchmark step demo {SMALL} {FEW} --micro-batch 2 --compare-gradients zero1 zero2 --json"
    done = compute(shlex.split(words), processes=2)
    assert done.returncode == 0, done.stderr
    lines = lines_of(done.stdout)
    assert [(line["ds_config"], line["zero_stage"], line["gpus"]) for line in lines] == [
        ("zero1", 1, 2),
        ("zero2", 2, 2),
    ]
    for line in lines:
        theirs, ours = line["paths"]["deepspeed"], line["paths"]["flat"]
        assert ours["loss"] == theirs["loss"]
        assert ours["aten_calls"] < theirs["aten_calls"]
        assert ours["ratio"] == pytest.approx(ours["step_ms_median"] / theirs["step_ms_median"], abs=1e-4)
        assert theirs["ratio"] == 1


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_table_of_a_fine_tuning_says_where_it_was_measured(precision: str) -> None:
    done = compute(shlex.split(f"benchmark step demo_ft {SMALL} {FEW} --micro-batch 2 --precision {precision}"))
    assert done.returncode == 0, done.stderr
    for word in (
        "demo_ft: ViT-nano",
        f"precision {precision}",
        "zero_stage 2",
        "torch 2.",
        "commit",
        "clips/s",
        "CPU",
    ):
        assert word in done.stdout


OUT_OF_MEMORY_ON_RANK_1 = """
import os, sys
import torch
from everest_ds import cli
from everest_ds.benchmark.steps import workbench

real = workbench.take_step

def refuse(bench, inputs):
    if len(inputs[0]) > 1 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("no more")
    return real(bench, inputs)

workbench.take_step = refuse
sys.exit(cli.main(sys.argv[1:]))
"""


def test_one_process_without_memory_ends_all_and_says_so(tmp_path: Path) -> None:
    """The other process waits for it in a collective operation, for ever if the first did not exit."""
    script = tmp_path / "script.py"
    script.write_text(OUT_OF_MEMORY_ON_RANK_1)
    words = shlex.split(f"benchmark step demo {SMALL} {FEW} --micro-batch 1 2 4 --json")
    done = compute(words, processes=2, module=script)
    assert done.returncode != 0
    lines = lines_of(done.stdout)
    assert [(line["micro_batch"], line["out_of_memory"]) for line in lines] == [(1, False), (2, True)], done.stderr


def test_stage_is_measured_on_all_processes_and_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "stages.json"
    words = (
        f"benchmark step demo {SMALL} --steps 1 --warmup 0 --sweep-stages --stages zero1 --gpus 2 --micro-batch 1 3"
    )
    done = compute([*shlex.split(words), "--out", path])
    assert done.returncode == 0, done.stderr
    assert "fastest: zero1, micro-batch 1" in done.stdout  # 2 x 3 clips do not make up 32
    document = json.loads(path.read_text())
    assert [(row["zero_stage"], row["micro_batch"], row["gpus"]) for row in document["rows"]] == [
        (1, 1, 2), (1, 3, 2),
    ]  # fmt: skip
    assert document["recommended"] == document["rows"][0]
    assert document["config"]["recipe"] == "demo"
    assert document["faults"] == {}


def test_stage_that_cannot_be_measured_is_named(tmp_path: Path) -> None:
    """An attention backend that needs a GPU: every stage fails and is named."""
    words = f"benchmark step demo {SMALL} {FEW} --sweep-stages --stages zero1 --model.attention flash"
    done = compute([*shlex.split(words), "--out", tmp_path / "x.json"])
    assert done.returncode == 2
    assert "no stage could be measured: zero1: model.attention=flash is not available" in " ".join(
        done.stderr.split()
    )
    assert not (tmp_path / "x.json").exists()


def gpu_lines(words: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "everest_ds", "benchmark", "step", *words.split(), "--json"]
    environment = {**cpu_environment(), "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    del environment["DS_ACCELERATOR"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    return lines_of(done.stdout)


@pytest.mark.gpu
def test_line_of_a_gpu_has_every_number() -> None:
    first, second = gpu_lines("k400_vit_s --micro-batch 8 16 --steps 5 --warmup 2")
    for line in (first, second):
        assert line["precision"] == "bf16"
        assert 0 < line["mfu"] < 1
        assert line["ceiling_tflops"] > 10
        assert line["peak_allocated_gib"] <= line["peak_reserved_gib"]
        assert sum(line["shares"].values()) == pytest.approx(1, abs=5e-4)
        assert line["shares"]["attention"] > 0
        assert line["shares"]["linear"] > 0
        assert 0 < line["kernel_launches"] < line["aten_calls"]
    assert second["added_mb_per_clip"] > 0


@pytest.mark.gpu
def test_sweep_of_a_gpu_ends_where_memory_does() -> None:
    lines = gpu_lines("k400_vit_b --micro-batch auto --memory-gib 8 --steps 2 --warmup 1")
    assert [line["micro_batch"] for line in lines] == [8 * 2**i for i in range(len(lines))]
    assert [line["out_of_memory"] for line in lines] == [False] * (len(lines) - 1) + [True]
