"""Between lines of metrics the host does not wait for the device, and results are the same as if it did.

Seven steps of two micro-batches, a line every three steps; the loss of the fifth step is NaN.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.integration.scanning import reported, scan

# ZeRO stage : precision : clipping norm. Gradient norms are at least 1.01.
ON_DEVICE = ("2:bf16:1", "2:fp32:1", "2:fp32:0", "1:fp32:1", "1:bf16:1", "0:fp32:1", "0:bf16:1")
BY_DEEPSPEED = ("3:fp32:1", "3:bf16:1")
LOSS_RTOL = 1e-6  # measured: 5e-8 in float32
BF16_RTOL = 1e-3  # measured: 2.3e-4 against ZeRO-1; against ZeRO-3 losses are equal and norms 5e-8 apart


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("waiting")
    return {line["case"]: line for line in scan("waiting", folder, *ON_DEVICE, *BY_DEEPSPEED)}


@pytest.mark.parametrize("case", ON_DEVICE)
def test_host_never_waits_between_lines(case: str, scanned: dict[str, Any]) -> None:
    assert scanned[case]["waits"] == {str(step): [] for step in range(1, 8)}


@pytest.mark.parametrize("case", BY_DEEPSPEED)
def test_deepspeed_waits_where_the_step_is_left_to_it(case: str, scanned: dict[str, Any]) -> None:
    """Shows that the scan detects waits."""
    assert scanned[case]["waits"]["2"]


@pytest.mark.parametrize("case", (*ON_DEVICE, *BY_DEEPSPEED))
def test_step_that_is_not_finite_is_told_of_with_the_next_line_and_left_out_of_it(
    case: str, scanned: dict[str, Any]
) -> None:
    lines = scanned[case]["lines"]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 3),
        ("event", 5),
        ("train", 6),
        ("train", 7),
    ]
    assert (lines[1]["event"], lines[1]["num_skipped"]) == ("skipped_step", 1)
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines if line["kind"] == "train")


@pytest.mark.parametrize(
    ("ours", "theirs", "rtol"),
    [
        ("2:fp32:1", "3:fp32:1", LOSS_RTOL),
        ("1:fp32:1", "3:fp32:1", LOSS_RTOL),
        ("0:fp32:1", "3:fp32:1", LOSS_RTOL),
        ("2:bf16:1", "3:bf16:1", BF16_RTOL),
        ("2:bf16:1", "1:bf16:1", BF16_RTOL),
    ],
)
def test_losses_and_norms_are_those_of_deepspeeds_own_step(
    ours: str, theirs: str, rtol: float, scanned: dict[str, Any]
) -> None:
    for name in ("loss", "grad_norm"):
        found, expected = (
            [line[name] for line in scanned[case]["lines"] if line["kind"] == "train"] for case in (ours, theirs)
        )
        assert found == pytest.approx(expected, rel=rtol)


def test_clipping_takes_part(scanned: dict[str, Any]) -> None:
    clipped, free = (
        [line["loss"] for line in scanned[c]["lines"] if "loss" in line] for c in ("2:fp32:1", "2:fp32:0")
    )
    assert clipped != free


@pytest.mark.gpu
def test_host_never_waits_for_a_gpu(tmp_path: Path) -> None:
    """Torch's debug mode makes any synchronising call an error."""
    words = [sys.executable, "-m", "tests.integration.scan_waiting", str(tmp_path), "2:bf16:1", "2:bf16:0"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    seen = reported(done.stdout)
    assert len(seen) == 2
    assert all(case["waits"] == {str(step): [] for step in range(1, 8)} for case in seen)
