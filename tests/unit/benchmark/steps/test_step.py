"""`everest benchmark step`: the end of a sweep over micro-batch sizes, and refused settings."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from everest_ds import cli
from everest_ds.benchmark.steps import step

CPU = torch.device("cpu")


def test_sweep_ends_where_memory_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the engine is a fake: sizes, output lines and the end of the sweep are the command's."""

    def measure(bench: Any, size: int, **options: Any) -> dict[str, Any]:
        if size > 2:
            raise torch.OutOfMemoryError("no more")
        sizes = {"peak_allocated_gib": 1.0 + size, "peak_reserved_gib": 9.0}
        return {"clips_per_s": 3.0, "tokens_per_s": 30.0, "step_ms_median": 1.0, "step_ms_p90": 2.0, **sizes} | {
            "mfu": 0.5, "mfu_data_sheet": None, "shares": None, "aten_calls": 9267, "kernel_launches": None,
            "kernels": [{"name": "gemm", "ms": 1.5, "share": 0.75, "times": 2.0}],
        }  # fmt: skip

    bench = SimpleNamespace(device=CPU, settings={"zero_stage": 2})
    monkeypatch.setattr(step, "build_workbench", lambda *given, **named: bench)
    monkeypatch.setattr(step, "measure_steps", measure)
    words = ["benchmark", "step", "demo", "--micro-batch", "1", "2", "4", "8"]
    assert cli.main([*words, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["micro_batch"], line["out_of_memory"]) for line in lines] == [(1, False), (2, False), (4, True)]
    assert "clips_per_s" not in lines[2]
    assert lines[0]["added_mb_per_clip"] is None
    assert lines[1]["added_mb_per_clip"] == pytest.approx(2**30 / 1e6, abs=1e-3)
    assert cli.main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].strip() == "4  out of memory"
    assert shown[-2].split() == ["1.500", "75.0%", "2.0", "gemm"]
    assert "50.0%" in shown[-4]
    assert shown[-4].split()[-2:] == ["9267", "-"]


def test_auto_doubles_until_memory_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fake GPU has memory for 64 clips."""

    def measure(bench: Any, size: int, **options: Any) -> dict[str, Any]:
        if size > 64:
            raise torch.OutOfMemoryError("no more")
        return {"peak_reserved_gib": None}

    built: list[int] = []

    def build(*given: Any, micro_size: int) -> SimpleNamespace:
        built.append(micro_size)
        return SimpleNamespace(device=CPU, settings={})

    monkeypatch.setattr(step.distributed, "select_accelerator", lambda: True)
    monkeypatch.setattr(step, "build_workbench", build)
    monkeypatch.setattr(step, "measure_steps", measure)
    assert cli.main(["benchmark", "step", "demo", "--micro-batch", "auto", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["micro_batch"] for line in lines] == [8, 16, 32, 64, 128]
    assert [line["out_of_memory"] for line in lines] == [False] * 4 + [True]
    assert built == [8]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("demo --micro-batch 0", "--micro-batch 0 must be auto, or whole numbers of at least 1"),
        ("demo --micro-batch 4 many", "--micro-batch 4 many must be auto"),
        ("demo --micro-batch auto", "there is none; name sizes, for example --micro-batch 1 2 4"),
        ("demo --memory-gib 8", "--memory-gib 8.0 needs a GPU, and there is none"),
        ("demo --memory-gib nan", "--memory-gib nan must be a number of GiB above 0"),
        ("demo --steps 0", "--steps 0 must be at least 1"),
        ("demo --warmup -1", "--warmup -1 must be at least 0"),
        ("demo --kernels -1", "--kernels -1 must be at least 0"),
        (
            "demo --compare-gradients zero2 --micro-batch 1 2",
            "--compare-gradients needs one micro-batch, got --micro-batch 1 2",
        ),
        ("demo --compare-gradients zero4", "--compare-gradients zero4: ds_configs has no such file"),
        (
            "demo --compare-gradients zero2 --compare everest",
            "--compare and --compare-gradients cannot be combined",
        ),
        ("demo --compare-gradients zero2 --ds-config x.json", "--compare-gradients takes no DeepSpeed file"),
        ("demo --gpus 2", "--gpus 2 has an effect only with --sweep-stages"),
        ("demo --out x.json", "--out x.json has an effect only with --sweep-stages"),
        ("demo --sweep-stages --gpus 0", "--gpus 0 must be at least 1"),
        ("demo --sweep-stages --stages zero4", "--stages zero4: ds_configs has no such file"),
        ("demo --sweep-stages --compare everest", "--compare and --sweep-stages cannot be combined"),
        ("demo --sweep-ratio 0.2 0.3 --sweep-frames 8 16", "--sweep-ratio and --sweep-frames cannot be combined"),
        ("demo --sweep-ratio 0.2 0.3", "--sweep-ratio 0.2 0.3 must name at least 3 different values"),
        ("demo --sweep-frames 8 16 8", "--sweep-frames 8 16 8 must name at least 3 different values"),
        ("demo --sweep-ratio 0.5 1.0 1.5", "selection.selected_ratio=1.5"),
        ("demo --sweep-frames 8 15 16", "num_frames=15 is not a positive multiple"),
        (
            "demo --sweep-ratio 0.2 0.3 0.4 --micro-batch 1 2",
            "--sweep-ratio needs one micro-batch, got --micro-batch 1 2",
        ),
        ("demo --sweep-stages --ds-config ds_configs/zero1.json", "takes no DeepSpeed file"),
        ("demo --ds-config absent.json", "absent.json"),
        ("demo_ft --compare everest", "demo_ft is one of fine-tuning"),
        ("demo --compare everest", "16 frames of 224 pixels in tubelets of 2 x 16 x 16"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_way_out(
    words: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["benchmark", "step", *words.split()]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_modes_without_a_launcher_refuse_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["benchmark", "step", "demo", "--sweep-stages"]) == 2
    assert "--sweep-stages got 2 processes; start it without a launcher" in capsys.readouterr().err
    assert cli.main(["benchmark", "step", "demo", "--sweep-frames", "8", "16", "24"]) == 2
    assert "--sweep-frames got 2 processes; start it without a launcher" in capsys.readouterr().err
